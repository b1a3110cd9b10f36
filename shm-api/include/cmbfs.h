/* cmbfs: files on an NVMe drive as shared memory. The wire protocol in C, and the seqlock read.
 *
 * Everything is little-endian; this header is for little-endian machines. docs/protocol.md explains what is only named here.
 * Header only, C11 with the __atomic builtins of GCC or Clang. SPDX-License-Identifier: MIT OR Apache-2.0 */
#ifndef CMBFS_H
#define CMBFS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "cmbfs.h: little-endian machines only"
#endif

#define CMBFS_MAGIC 0x46424d43u /* "CMBF" */
#define CMBFS_VERSION 1
#define CMBFS_REPLY 0x8000u
#define CMBFS_MAX_MESSAGE 32768
#define CMBFS_MAX_WINDOWS 1024

struct cmbfs_header {
  uint32_t magic;
  uint16_t version;
  uint16_t opcode; /* CMBFS_OP_*, in replies with CMBFS_REPLY set */
  uint64_t request;
  uint32_t length; /* of the whole message */
  uint32_t status; /* replies: 0 or an error code */
  uint32_t fds;
  uint32_t reserved;
};

enum cmbfs_op {
  CMBFS_OP_HELLO = 1,
  CMBFS_OP_INFO = 2,
  CMBFS_OP_STATUS = 3,
  CMBFS_OP_KICK = 4,
  CMBFS_OP_OPEN = 16,
  CMBFS_OP_CLOSE = 17,
  CMBFS_OP_STAT = 18,
  CMBFS_OP_FILE_STAT = 19,
  CMBFS_OP_LIST = 20,
  CMBFS_OP_MKDIR = 21,
  CMBFS_OP_UNLINK = 22,
  CMBFS_OP_RMDIR = 23,
  CMBFS_OP_RENAME = 24,
  CMBFS_OP_TRUNCATE = 25,
  CMBFS_OP_SET_ATTR = 26,
  CMBFS_OP_SET_PLACEMENT = 27,
  CMBFS_OP_SYNC = 28,
  CMBFS_OP_MAP = 32,
  CMBFS_OP_UNMAP = 33,
  CMBFS_OP_COMMIT = 34,
  CMBFS_OP_FAULT = 35,
  CMBFS_OP_REVOKE = 36,
  CMBFS_OP_READ = 37,
  CMBFS_OP_ALLOCATE = 44,
  CMBFS_OP_MEMORY = 45,
  CMBFS_OP_PEER_ATTACH = 48,
  CMBFS_OP_PEER_MAP = 49,
  CMBFS_OP_PEER_DMA = 50,
  CMBFS_OP_PEER_REVOKE = 51,
  CMBFS_OP_PEER_DETACH = 52,
  CMBFS_OP_PEER_LIST = 53,
  CMBFS_OP_PEER_READ = 54,
  CMBFS_OP_PEER_WRITE = 55,
  CMBFS_OP_PEER_OPEN = 56,
  CMBFS_OP_PEER_FLUSH = 57,
  CMBFS_OP_LAYOUT_MAP = 64,
  CMBFS_OP_LAYOUT_SHARE = 65,
  CMBFS_OP_LAYOUT_COMMIT = 66,
  CMBFS_OP_LAYOUT_RELEASE = 67,
  CMBFS_OP_LAYOUT_RECALLS = 68
};

enum cmbfs_error {
  CMBFS_E_BAD_MESSAGE = 1,
  CMBFS_E_BAD_VERSION = 2,
  CMBFS_E_BAD_STATE = 3,
  CMBFS_E_BAD_HANDLE = 4,
  CMBFS_E_INVALID = 5,
  CMBFS_E_DENIED = 6,
  CMBFS_E_TOO_MANY = 7,
  CMBFS_E_SHUTTING_DOWN = 8,
  CMBFS_E_NOT_FOUND = 16,
  CMBFS_E_EXISTS = 17,
  CMBFS_E_NOT_A_DIRECTORY = 18,
  CMBFS_E_IS_A_DIRECTORY = 19,
  CMBFS_E_NOT_EMPTY = 20,
  CMBFS_E_NO_SPACE = 21,
  CMBFS_E_NAME_TOO_LONG = 22,
  CMBFS_E_READ_ONLY = 23,
  CMBFS_E_DAMAGED = 24,
  CMBFS_E_DEVICE = 25,
  CMBFS_E_TOO_BIG = 26,
  CMBFS_E_DATA_LOST = 27,
  CMBFS_E_NOT_RESIDENT = 32,
  CMBFS_E_PEER_FAULT = 33,
  CMBFS_E_UNSUPPORTED = 34,
  CMBFS_E_INTERNAL = 35,
  CMBFS_E_LEASED = 36,
  CMBFS_E_STALE_LEASE = 37,
  CMBFS_E_MOVING = 38
};

struct cmbfs_error_body { /* the text follows */
  uint32_t errno_value;
  uint32_t reserved;
};

struct cmbfs_hello_request {
  uint16_t min_version;
  uint16_t max_version;
  uint32_t reserved;
};

enum { CMBFS_CMB_GIVEN = 0, CMBFS_CMB_NONE = 1, CMBFS_CMB_OTHER_UID = 2, CMBFS_CMB_OFF = 3 };

struct cmbfs_hello_reply { /* fds: control (read-only), client region, ring, and the CMB if given; a text follows */
  uint64_t control_len;
  uint64_t slots_len;
  uint64_t ring_len;
  uint64_t cmb_len;
  uint64_t cmb_offset;
  uint8_t uuid[16];
  uint16_t version;
  uint16_t reserved;
  uint32_t cmb_reason;
  uint32_t uid;
  uint32_t client;
};

enum {
  CMBFS_OPEN_READ = 1,
  CMBFS_OPEN_WRITE = 2,
  CMBFS_OPEN_CREATE = 4,
  CMBFS_OPEN_EXCLUSIVE = 8,
  CMBFS_OPEN_TRUNCATE = 16,
  CMBFS_OPEN_TEMPORARY = 32
};

struct cmbfs_open_request { /* the path follows */
  uint32_t flags;
  uint32_t mode;
};

struct cmbfs_open_reply { /* fd: the file's host cache */
  uint64_t handle;
  uint64_t ino;
  uint64_t size;
  uint64_t cache_len;
  uint64_t window_size;
};

struct cmbfs_handle_request {
  uint64_t handle;
};

struct cmbfs_stat_reply {
  uint64_t ino;
  uint64_t size;
  uint64_t allocated;
  uint64_t mtime_ns;
  uint64_t ctime_ns;
  uint32_t kind; /* 1: file, 2: directory */
  uint32_t mode;
  uint32_t uid;
  uint32_t gid;
  uint32_t links;
  uint16_t placement; /* 0: auto, 1: CMB while there is room, 2: host cache only */
  uint16_t placed_by; /* 0: nobody, 1: the file, 2: the filesystem, 3: the server */
};

struct cmbfs_list_request { /* path, then the name after which to go on */
  uint32_t path_len;
  uint32_t after_len;
};

struct cmbfs_list_reply { /* count times: cmbfs_dir_record and its name */
  uint32_t count;
  uint32_t more;
};

struct cmbfs_dir_record {
  uint64_t ino;
  uint64_t size;
  uint32_t kind;
  uint32_t mode;
  uint32_t uid;
  uint32_t name_len;
};

enum { CMBFS_MAP_WRITE = 1, CMBFS_MAP_HOST = 2 };

struct cmbfs_map_request {
  uint64_t handle;
  uint64_t offset;
  uint64_t len;
  uint32_t flags;
  uint32_t reserved;
};

struct cmbfs_map_reply { /* count times cmbfs_window_record */
  uint64_t map;
  uint64_t first;
  uint64_t size;
  uint64_t window_size;
  uint32_t count;
  uint32_t reserved;
};

struct cmbfs_window_record {
  uint32_t slot;
  uint32_t incarnation;
  uint32_t dirty_word;
  uint32_t reserved;
};

struct cmbfs_unmap_request {
  uint64_t map;
};

struct cmbfs_fault_request {
  uint64_t handle;
  uint64_t offset;
  uint32_t flags;
  uint32_t reserved;
};

struct cmbfs_fault_reply {
  uint32_t slot;
  uint32_t incarnation;
  uint32_t place; /* 1: CMB, 2: host cache */
  uint32_t reason;
};

struct cmbfs_commit_request {
  uint64_t handle;
  uint64_t offset;
  uint64_t len;
  uint64_t size;
};

struct cmbfs_commit_reply {
  uint64_t size;
  uint64_t from_cmb;
  uint64_t from_host;
};

/* Device memory: the drive's PMR, or what a peer exports. */
enum { CMBFS_MEMORY_PMR = 1, CMBFS_MEMORY_EXPORT = 2, CMBFS_MEMORY_SHARED = 3 };

struct cmbfs_memory_request { /* a name may follow */
  uint32_t what; /* CMBFS_MEMORY_* */
  uint32_t reserved;
  uint64_t peer; /* for CMBFS_MEMORY_EXPORT, else 0 */
};

struct cmbfs_memory_reply { /* fds: host cache, and the memory if given: `cmb` of a cmbfs_view of this file; a text follows */
  uint64_t handle;
  uint64_t ino;
  uint64_t size;
  uint64_t cache_len;
  uint64_t window_size;
  uint64_t memory_len;
  uint64_t memory_offset; /* in its descriptor */
  uint64_t canary;        /* offset in the memory of a word that never holds all ones; all ones: ordinary memory */
  uint32_t reason;        /* CMBFS_CMB_*: whether the memory is given */
  uint32_t reserved;
};

/* Layouts: block numbers under a lease. */
enum { CMBFS_LAYOUT_READ = 1, CMBFS_LAYOUT_WRITE = 2 };
enum { CMBFS_EXTENT_HOLE = 0, CMBFS_EXTENT_UNWRITTEN = 1, CMBFS_EXTENT_WRITTEN = 2 };
#define CMBFS_MAX_EXTENTS 512

struct cmbfs_layout_map_request {
  uint64_t handle;
  uint64_t offset;
  uint64_t len;
  uint32_t access; /* CMBFS_LAYOUT_* */
  uint32_t reserved;
};

struct cmbfs_layout_reply { /* count times cmbfs_extent_record */
  uint64_t lease;
  uint64_t device_generation;
  uint64_t ino;
  uint64_t size;
  uint8_t uuid[16];
  uint32_t block_size; /* of the device: what lba counts */
  uint32_t access;
  uint32_t count;
  uint32_t reserved;
};

struct cmbfs_extent_record {
  uint64_t offset;
  uint64_t lba;
  uint64_t blocks; /* of 4096 bytes */
  uint32_t state;  /* CMBFS_EXTENT_* */
  uint32_t reserved;
};

struct cmbfs_lease_request {
  uint64_t lease;
  uint64_t device_generation;
};

struct cmbfs_layout_commit_request { /* count times cmbfs_extent_record; the reply is the size, uint64_t */
  uint64_t lease;
  uint64_t device_generation;
  uint64_t size;
  uint32_t count;
  uint32_t reserved;
};

struct cmbfs_layout_release_request {
  uint64_t lease;
  uint64_t device_generation;
  uint64_t offset;
  uint64_t len; /* 0: all of it */
};

struct cmbfs_recalls_reply { /* count times cmbfs_recall_record */
  uint32_t count;
  uint32_t more;
};

struct cmbfs_recall_record {
  uint64_t lease;
  uint64_t device_generation;
  uint64_t offset;
  uint64_t len;
  uint64_t deadline; /* nanoseconds since 1970 */
};

/* How often something was asked back of this client's leases: a futex word in the ring region. */
#define CMBFS_RING_RECALLS 448
static inline uint32_t cmbfs_recalls(const void *ring) {
  return __atomic_load_n((const uint32_t *)((const char *)ring + CMBFS_RING_RECALLS), __ATOMIC_ACQUIRE);
}

#define CMBFS_ASSERT_SIZE(type, n) _Static_assert(sizeof(struct type) == (n), #type)
CMBFS_ASSERT_SIZE(cmbfs_header, 32);
CMBFS_ASSERT_SIZE(cmbfs_hello_request, 8);
CMBFS_ASSERT_SIZE(cmbfs_hello_reply, 72);
CMBFS_ASSERT_SIZE(cmbfs_open_reply, 40);
CMBFS_ASSERT_SIZE(cmbfs_stat_reply, 64);
CMBFS_ASSERT_SIZE(cmbfs_dir_record, 32);
CMBFS_ASSERT_SIZE(cmbfs_map_request, 32);
CMBFS_ASSERT_SIZE(cmbfs_map_reply, 40);
CMBFS_ASSERT_SIZE(cmbfs_window_record, 16);
CMBFS_ASSERT_SIZE(cmbfs_fault_request, 24);
CMBFS_ASSERT_SIZE(cmbfs_fault_reply, 16);
CMBFS_ASSERT_SIZE(cmbfs_commit_request, 32);
CMBFS_ASSERT_SIZE(cmbfs_commit_reply, 24);
CMBFS_ASSERT_SIZE(cmbfs_memory_request, 16);
CMBFS_ASSERT_SIZE(cmbfs_memory_reply, 72);
CMBFS_ASSERT_SIZE(cmbfs_layout_map_request, 32);
CMBFS_ASSERT_SIZE(cmbfs_layout_reply, 64);
CMBFS_ASSERT_SIZE(cmbfs_extent_record, 32);
CMBFS_ASSERT_SIZE(cmbfs_lease_request, 16);
CMBFS_ASSERT_SIZE(cmbfs_layout_commit_request, 32);
CMBFS_ASSERT_SIZE(cmbfs_layout_release_request, 32);
CMBFS_ASSERT_SIZE(cmbfs_recalls_reply, 8);
CMBFS_ASSERT_SIZE(cmbfs_recall_record, 40);
#undef CMBFS_ASSERT_SIZE

/* The control pages. Map them read-only. */
#define CMBFS_CONTROL_MAGIC 0x6c74637366626d63ull /* "cmbfsctl" */
enum {
  CMBFS_CONTROL_DEVICE_GENERATION = 64,
  CMBFS_CONTROL_SERVER = 72, /* robust futex word of the server */
  CMBFS_CONTROL_SLOTS = 16,
  CMBFS_CONTROL_HEADER = 4096,
  CMBFS_CONTROL_SLOT = 32,
  CMBFS_SLOT_GENERATION = 0,
  CMBFS_SLOT_PLACE = 8,
  CMBFS_SLOT_INCARNATION = 16
};

static inline int cmbfs_server_alive(const void *control) {
  uint32_t word = __atomic_load_n((const uint32_t *)((const char *)control + CMBFS_CONTROL_SERVER), __ATOMIC_ACQUIRE);
  return !(word & 0x40000000u) && (word & 0x3fffffffu);
}

/* What a reader has mapped of one file. The host cache is mapped from offset `host_base` of its descriptor on. */
struct cmbfs_view {
  const void *control;
  size_t control_len;
  const void *cmb; /* NULL if not given */
  size_t cmb_len;
  const void *host;
  uint64_t host_base;
  size_t host_len;
};

enum cmbfs_read_result {
  CMBFS_READ_OK = 0,
  CMBFS_READ_NOT_RESIDENT = 1, /* send Fault, then read again */
  CMBFS_READ_MOVING = 2,       /* read again */
  CMBFS_READ_UNMAPPED = 3,     /* at a place that the view does not cover: send Fault with CMBFS_MAP_HOST */
  CMBFS_READ_STALE = 4,        /* the window is not mapped any more */
  CMBFS_READ_SERVER_GONE = 5
};

/* Copies `len` bytes from `offset` of a window: no system call, and no store to shared memory. For a CMB in ordinary memory
 * (an emulated controller's); a real one wants aligned loads of at most 8 bytes and a look at the canary, see docs/protocol.md. */
static inline enum cmbfs_read_result cmbfs_window_read(const struct cmbfs_view *view, uint32_t slot,
                                                       uint32_t incarnation, uint64_t offset, void *into, size_t len) {
  const char *control = (const char *)view->control;
  size_t at = CMBFS_CONTROL_HEADER + (size_t)slot * CMBFS_CONTROL_SLOT;
  if (at + CMBFS_CONTROL_SLOT > view->control_len) return CMBFS_READ_STALE;
  const uint64_t *device = (const uint64_t *)(control + CMBFS_CONTROL_DEVICE_GENERATION);
  const uint64_t *generation = (const uint64_t *)(control + at + CMBFS_SLOT_GENERATION);
  const uint64_t *place_word = (const uint64_t *)(control + at + CMBFS_SLOT_PLACE);
  const uint32_t *incarnation_word = (const uint32_t *)(control + at + CMBFS_SLOT_INCARNATION);
  for (int attempt = 0; attempt < 64; attempt++) {
    if (__atomic_load_n(incarnation_word, __ATOMIC_RELAXED) != incarnation) return CMBFS_READ_STALE;
    uint64_t dev = __atomic_load_n(device, __ATOMIC_ACQUIRE);
    uint64_t gen = __atomic_load_n(generation, __ATOMIC_ACQUIRE);
    uint64_t place = __atomic_load_n(place_word, __ATOMIC_ACQUIRE);
    unsigned home = (unsigned)(place & 3);
    if ((home != 1 && home != 2) || place >> 48 != (dev & 0xffff))
      return cmbfs_server_alive(control) ? CMBFS_READ_NOT_RESIDENT : CMBFS_READ_SERVER_GONE;
    uint64_t from = (((place >> 2) & ((1ull << 46) - 1)) << 12) + offset;
    const char *base = home == 1 ? (const char *)view->cmb : (const char *)view->host;
    uint64_t start = home == 1 ? 0 : view->host_base;
    uint64_t have = home == 1 ? view->cmb_len : view->host_len;
    if (!base || from < start || from - start > have || len > have - (from - start)) return CMBFS_READ_UNMAPPED;
    const volatile char *src = base + (from - start);
#if defined(__x86_64__)
    {
      const volatile char *s = src;
      void *d = into;
      size_t n = len;
      __asm__ volatile("rep movsb" : "+S"(s), "+D"(d), "+c"(n) : : "memory");
    }
#else
    size_t i = 0;
    if ((uintptr_t)src % 8 == 0)
      for (; i + 8 <= len; i += 8) {
        uint64_t word = *(const volatile uint64_t *)(src + i);
        memcpy((char *)into + i, &word, 8);
      }
    for (; i < len; i++) ((char *)into)[i] = src[i];
#endif
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (__atomic_load_n(generation, __ATOMIC_RELAXED) == gen && __atomic_load_n(device, __ATOMIC_RELAXED) == dev)
      return cmbfs_server_alive(control) ? CMBFS_READ_OK : CMBFS_READ_SERVER_GONE;
  }
  return CMBFS_READ_MOVING;
}

#endif
