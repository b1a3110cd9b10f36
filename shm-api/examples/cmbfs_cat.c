/* Prints a file of a cmbfs server: cmbfs_cat SOCKET PATH. Reads it through shared-memory windows.
 * cc -std=gnu11 -I ../include cmbfs_cat.c -o cmbfs_cat */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "cmbfs.h"

static int sock;
static uint64_t next_request = 1;
static union {
  char bytes[CMBFS_MAX_MESSAGE];
  struct cmbfs_header header;
} reply;

static void die(const char *what) {
  perror(what);
  exit(1);
}

/* Sends a request and receives its reply; returns the reply's body. Descriptors go to `fds` (room for 8). */
static const void *call(uint16_t op, const void *body, size_t body_len, const void *tail, size_t tail_len, int *fds) {
  struct cmbfs_header header = {CMBFS_MAGIC, CMBFS_VERSION, op, next_request++,
                                (uint32_t)(sizeof header + body_len + tail_len), 0, 0, 0};
  struct iovec parts[3] = {{&header, sizeof header}, {(void *)body, body_len}, {(void *)tail, tail_len}};
  struct msghdr out = {.msg_iov = parts, .msg_iovlen = 3};
  if (sendmsg(sock, &out, MSG_NOSIGNAL) < 0) die("send");
  union {
    char space[CMSG_SPACE(8 * sizeof(int))];
    struct cmsghdr align;
  } control;
  struct iovec in_part = {reply.bytes, sizeof reply.bytes};
  struct msghdr in = {.msg_iov = &in_part, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
  ssize_t got = recvmsg(sock, &in, MSG_CMSG_CLOEXEC);
  if (got < (ssize_t)sizeof(struct cmbfs_header)) die("receive");
  for (struct cmsghdr *c = CMSG_FIRSTHDR(&in); c && fds; c = CMSG_NXTHDR(&in, c))
    if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
  if (reply.header.status) {
    fprintf(stderr, "%.*s\n", (int)(got - 40), reply.bytes + 40);
    exit(1);
  }
  return reply.bytes + sizeof(struct cmbfs_header);
}

static void *map(int fd, size_t len, off_t offset) {
  void *at = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, offset);
  if (at == MAP_FAILED) die("mmap");
  return at;
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s SOCKET PATH\n", argv[0]);
    return 2;
  }
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
  sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof address) < 0) die(argv[1]);

  int fds[8];
  struct cmbfs_hello_request hello = {CMBFS_VERSION, CMBFS_VERSION, 0};
  struct cmbfs_hello_reply regions = *(const struct cmbfs_hello_reply *)call(CMBFS_OP_HELLO, &hello, sizeof hello, "", 0, fds);
  struct cmbfs_view view = {.control = map(fds[0], regions.control_len, 0), .control_len = regions.control_len};
  if (regions.cmb_reason == CMBFS_CMB_GIVEN) {
    view.cmb = map(fds[3], regions.cmb_len, (off_t)regions.cmb_offset);
    view.cmb_len = regions.cmb_len;
  }

  struct cmbfs_open_request open_request = {CMBFS_OPEN_READ, 0};
  int cache;
  struct cmbfs_open_reply file =
      *(const struct cmbfs_open_reply *)call(CMBFS_OP_OPEN, &open_request, sizeof open_request, argv[2], strlen(argv[2]), fds);
  cache = fds[0];

  char *buffer = malloc(file.window_size);
  if (!buffer) die("malloc");
  for (uint64_t offset = 0; offset < file.size; offset += file.window_size) {
    struct cmbfs_map_request want = {file.handle, offset, file.window_size, 0, 0};
    const char *body = call(CMBFS_OP_MAP, &want, sizeof want, "", 0, NULL);
    struct cmbfs_map_reply mapped = *(const struct cmbfs_map_reply *)body;
    struct cmbfs_window_record window = *(const struct cmbfs_window_record *)(body + sizeof mapped);
    view.host = map(cache, file.window_size, (off_t)offset);
    view.host_base = offset;
    view.host_len = file.window_size;
    size_t len = file.size - offset < file.window_size ? file.size - offset : file.window_size;
    enum cmbfs_read_result result;
    while ((result = cmbfs_window_read(&view, window.slot, window.incarnation, 0, buffer, len)) != CMBFS_READ_OK) {
      if (result == CMBFS_READ_STALE || result == CMBFS_READ_SERVER_GONE) {
        fprintf(stderr, "the window or the server is gone (%d)\n", result);
        return 1;
      }
      struct cmbfs_fault_request fault = {file.handle, offset, result == CMBFS_READ_UNMAPPED ? CMBFS_MAP_HOST : 0, 0};
      call(CMBFS_OP_FAULT, &fault, sizeof fault, "", 0, NULL);
    }
    if (fwrite(buffer, 1, len, stdout) != len) die("write");
    munmap((void *)view.host, view.host_len);
    struct cmbfs_unmap_request unmap = {mapped.map};
    call(CMBFS_OP_UNMAP, &unmap, sizeof unmap, "", 0, NULL);
  }
  return 0;
}
