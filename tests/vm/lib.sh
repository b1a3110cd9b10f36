# Functions of the QEMU lab: requirements, kernel, initramfs, boot. Sourced by `run`; nothing here needs root.
# Everything made or downloaded is kept under target/vm/ and reused.

die() { echo "tests/vm: $*" >&2; exit 2; }

# need COMMAND PACKAGE: is it there, and if not, how to get it.
need() {
    command -v "$1" >/dev/null && return 0
    echo "tests/vm: $1 is missing; install it with: sudo apt-get install -y --no-install-recommends $2" >&2
    return 1
}

check_requirements() {
    local ok=0
    need qemu-system-x86_64 qemu-system-x86 || ok=1
    need busybox busybox-static || ok=1
    need cpio cpio || ok=1
    need xz xz-utils || ok=1
    need zstd zstd || ok=1
    need dpkg-deb dpkg || ok=1
    need mkfs.ext4 e2fsprogs || ok=1
    need fio fio || ok=1
    need nbdkit nbdkit || ok=1
    need cargo "rustc (or rustup, see README)" || ok=1
    if [ "$ok" = 0 ] && ldd "$(command -v busybox)" >/dev/null 2>&1; then
        echo "tests/vm: busybox is linked dynamically; install the static one: sudo apt-get install -y busybox-static" >&2
        ok=1
    fi
    return "$ok"
}

# unpack_kernel DEB... DIR: modules and a bootable image, without installing anything.
unpack_kernel() {
    local dir=${!#} image deb
    for deb in "${@:1:$#-1}"; do dpkg-deb -x "$deb" "$dir/x"; done
    image=$(find "$dir/x" -name 'vmlinuz*' -type f | head -1)
    [ -n "$image" ] || die "no kernel image in $*"
    # The ELF inside the bzImage boots (by PVH) in half the time that the bzImage needs to unpack itself.
    extract_elf "$image" "$dir/vmlinux.tmp" || cp "$image" "$dir/vmlinux.tmp"
    mv "$dir/vmlinux.tmp" "$dir/vmlinux"
}

# extract_elf BZIMAGE OUT: tries every place that looks like the start of a compressed ELF.
extract_elf() {
    local at
    for at in $(LC_ALL=C grep -aboP '\xfd7zXZ\x00' "$1" | cut -d: -f1); do
        tail -c +$((at + 1)) "$1" | xz -dcq >"$2" 2>/dev/null
        is_elf "$2" && return 0
    done
    for at in $(LC_ALL=C grep -aboP '\x28\xb5\x2f\xfd' "$1" | cut -d: -f1); do
        tail -c +$((at + 1)) "$1" | zstd -dcq >"$2" 2>/dev/null
        is_elf "$2" && return 0
    done
    rm -f "$2"
    return 1
}
is_elf() { [ "$(head -c 4 "$1" | tail -c 3)" = ELF ] && [ "$(stat -c %s "$1")" -gt 10000000 ]; }

# kernel_6_1: prints the folder of Debian 12's cloud kernel (vmlinux, x/lib/modules).
kernel_6_1() {
    local dir=$VM/kernel-6.1 package
    if [ ! -s "$dir/vmlinux" ]; then
        package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image-6/ {print $2; exit}')
        [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64; run: sudo apt-get update (a Debian 12 package source is needed)"
        rm -rf "$dir"; mkdir -p "$dir"
        echo "tests/vm: downloading $package" >&2
        (cd "$dir" && apt-get download "$package" >apt.log 2>&1) || { cat "$dir/apt.log" >&2; die "cannot download $package; try: sudo apt-get update"; }
        unpack_kernel "$dir"/*.deb "$dir"
        rm -f "$dir"/*.deb
    fi
    echo "$dir"
}

# Debian's mirror as this machine's apt knows it.
mirror() {
    local uri
    uri=$(apt-get indextargets --format '$(LABEL) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk '$1 == "Debian" && $2 !~ /-/ {print $3; exit}')
    [ -n "$uri" ] || die "apt has no Debian package source configured (see /etc/apt/sources.list.d)"
    echo "$uri"
}

# newer_debs OUT PACKAGE: downloads a package of Debian 13's backports with everything it needs into OUT. Nothing is installed and no root is needed:
# apt is given a state folder of its own, in which nothing is installed.
newer_debs() {
    local out=$1 package=$2 dir=$VM/apt-newer uri keyring=/usr/share/keyrings/debian-archive-keyring.gpg suite
    uri=$(mirror) || exit 2
    [ -e "$keyring" ] || die "$keyring is missing; install it with: sudo apt-get install -y debian-archive-keyring"
    rm -rf "$out"; mkdir -p "$dir"/{lists/partial,cache/archives/partial} "$out"
    for suite in trixie trixie-backports; do echo "deb [signed-by=$keyring] $uri $suite main"; done >"$dir/sources.list"
    : >"$dir/status"
    echo "tests/vm: downloading $package of trixie-backports" >&2
    {
        private_apt "$dir" update &&
            private_apt "$dir" install -y --download-only --no-install-recommends -t trixie-backports "$package"
    } >"$VM/apt.log" 2>&1 || { tail -5 "$VM/apt.log" >&2; die "cannot download $package of Debian trixie-backports from $uri"; }
    mv "$dir"/cache/archives/*.deb "$out"
    rm -rf "$dir"
}
private_apt() {
    local dir=$1; shift
    apt-get -q -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::State="$dir" -o Dir::State::status="$dir/status" -o Dir::Cache="$dir/cache" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User= "$@"
}

# kernel_newer: prints the folder of the cloud kernel of Debian 13's backports (7.3 and later).
kernel_newer() {
    local dir=$VM/kernel-newer
    if [ ! -s "$dir/vmlinux" ]; then
        newer_debs "$dir" linux-image-cloud-amd64
        unpack_kernel "$dir"/linux-{binary,modules}-[0-9]*.deb "$dir"
        rm -f "$dir"/*.deb
    fi
    echo "$dir"
}

# qemu_newer: prints the folder of a QEMU that has vfio-user-pci (10.1 and later), unpacked together with the libraries it needs.
qemu_newer() {
    local dir=$VM/qemu-newer deb
    if [ ! -e "$dir/ready" ]; then
        newer_debs "$dir" qemu-system-x86
        for deb in "$dir"/*.deb; do dpkg-deb -x "$deb" "$dir/root" || die "cannot unpack $deb"; done
        rm -f "$dir"/*.deb
        touch "$dir/ready"
    fi
    echo "$dir/root"
}

# nvme_cli: prints a folder with nvme-cli, the libraries it needs, and the loader to start it with.
nvme_cli() {
    local dir=$VM/nvme-cli root=$VM/nvme-cli/root lib deb file
    if [ ! -e "$dir/tool/nvme" ]; then
        newer_debs "$dir" nvme-cli
        for deb in "$dir"/*.deb; do dpkg-deb -x "$deb" "$root" || die "cannot unpack $deb"; done
        lib=$root/usr/lib/x86_64-linux-gnu
        mkdir -p "$dir/tool.tmp"
        for file in $("$lib/ld-linux-x86-64.so.2" --library-path "$lib" --list "$root/usr/sbin/nvme" | grep -o '/[^ ]*'); do
            cp -L "$file" "$dir/tool.tmp"
        done
        cp -L "$lib/ld-linux-x86-64.so.2" "$root/usr/sbin/nvme" "$dir/tool.tmp"
        mv "$dir/tool.tmp" "$dir/tool"
        rm -rf "$root" "$dir"/*.deb
    fi
    echo "$dir/tool"
}

# module_closure KERNELDIR MODULE...: the files to insmod, dependencies first.
module_closure() {
    local root=$1 name file deps dep; shift
    for name; do
        file=$(find "$root/x" \( -name "${name//_/[-_]}.ko" -o -name "${name//_/[-_]}.ko.xz" \) | head -1)
        [ -n "$file" ] || { [ "$name" = vfio_virqfd ] || echo "tests/vm: module $name is not in $root (built in?)" >&2; continue; }
        deps=$(read_module "$file" | tr '\0' '\n' | sed -n 's/^depends=//p' | tr ',-' ' _')
        for dep in $deps; do module_closure "$root" "$dep"; done
        echo "$file"
    done
}
read_module() { case $1 in *.xz) xz -dc "$1" ;; *) cat "$1" ;; esac; }

# make_initramfs OUT KERNELDIR "MODULE..." BINARY|FOLDER...: a newc archive of busybox, modules, programs with their libraries, and folders.
make_initramfs() {
    local out=$1 kernel=$2 modules=$3 tree order=0 file binary lib; shift 3
    tree=$(mktemp -d "$VM/tree.XXXXXX"); chmod 755 "$tree"
    mkdir -p "$tree"/{bin,dev,proc,sys,tmp,mnt,run,etc,modules}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    for file in sh mount umount insmod echo cat poweroff reboot mkdir ls sleep sync cut timeout dmesg grep rm blkdiscard; do ln -s busybox "$tree/bin/$file"; done
    # shellcheck disable=SC2086 # a list of module names
    for file in $(module_closure "$kernel" $modules | awk '!seen[$0]++'); do
        order=$((order + 1))
        read_module "$file" >"$tree/modules/$(printf %02d "$order")-$(basename "${file%.xz}")"
    done
    for binary; do
        [ -d "$binary" ] && { cp -r "$binary" "$tree/tool"; continue; }
        cp "$binary" "$tree/bin/"
        for lib in $(ldd "$binary" 2>/dev/null | grep -o '/[^ ]*'); do mkdir -p "$tree$(dirname "$lib")"; cp -nL "$lib" "$tree$lib"; done
    done
    cp "$HERE/init" "$tree/init"; chmod +x "$tree/init"
    (cd "$tree" && find . -print0 | cpio --null --quiet -o -H newc -R 0:0) >"$out.tmp" && mv "$out.tmp" "$out"
    rm -rf "$tree"
}

# boot NAME SECONDS QEMU ARG...: runs a guest to its end. The guest's test output is in target/vm/NAME/out, its exit statuses
# ("CASE STATUS" a line) in target/vm/NAME/rc. QEMU itself exits 0 even when the guest panics, so only rc counts.
boot() {
    local name=$1 limit=$2 dir=$VM/$1 status try; shift 2
    mkdir -p "$dir"
    for try in 1 2; do
        rm -f "$dir"/{console,out,rc,qemu.log}; : >"$dir/rc"; : >"$dir/out"
        timeout --kill-after=5 "$limit" "$@" \
            -display none -nodefaults -no-user-config -no-reboot \
            -serial "file:$dir/console" -serial "file:$dir/out" -serial "file:$dir/rc" >"$dir/qemu.log" 2>&1
        status=$?
        [ "$status" = 124 ] && echo "the guest did not finish within $limit s" >>"$dir/qemu.log"
        # Emulated processors on a busy host lose time, and some kernels panic over that while they boot. Once a case has begun,
        # a panic is the case's failure.
        if [ "$try" = 1 ] && [ ! -s "$dir/out" ] && [ ! -s "$dir/rc" ] && grep -aq 'Kernel panic' "$dir/console"; then
            echo "tests/vm: the guest $name panicked before its first case; booting once more. Its last words:"
            tail -n 5 "$dir/console"
            continue
        fi
        return "$status"
    done
}
