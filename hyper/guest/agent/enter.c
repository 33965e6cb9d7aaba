/* From the assembled root to inside of it: mounts, devices, files, masks, then pivot_root. Runs in the waiting process. */
#include "inside.h"
#include "mounts.h"
#include "setup.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* runtime-spec, config-linux.md, "Default Devices" and "Symbolic links". */
static const struct {
    const char *name;
    unsigned major, minor;
} DEVICES[] = {{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}};

static const char *const LINKS[][2] = {
    {"fd", "/proc/self/fd"},
    {"stdin", "/proc/self/fd/0"},
    {"stdout", "/proc/self/fd/1"},
    {"stderr", "/proc/self/fd/2"},
    {"core", "/proc/kcore"},
    {"ptmx", "pts/ptmx"},
};

static int make_devices(int root, struct error *e) {
    int dev = inside_make_directory(root, "/dev", 0755);
    if (dev < 0)
        return fail_errno(e, errno, "cannot make /dev in the root");
    mode_t before = umask(0);
    int result = 0;
    for (size_t i = 0; i < sizeof(DEVICES) / sizeof(*DEVICES) && result == 0; i++) {
        dev_t number = makedev(DEVICES[i].major, DEVICES[i].minor);
        struct stat st;
        if (mknodat(dev, DEVICES[i].name, S_IFCHR | 0666, number) == 0)
            continue;
        if (errno != EEXIST || fstatat(dev, DEVICES[i].name, &st, AT_SYMLINK_NOFOLLOW) < 0)
            result = fail_errno(e, errno, "cannot make /dev/%s", DEVICES[i].name);
        else if (!S_ISCHR(st.st_mode) || st.st_rdev != number)
            result = fail(e, "InvalidRequest", "the image has a /dev/%s that is not that device", DEVICES[i].name);
    }
    umask(before);
    for (size_t i = 0; i < sizeof(LINKS) / sizeof(*LINKS) && result == 0; i++)
        if (symlinkat(LINKS[i][1], dev, LINKS[i][0]) < 0 && errno != EEXIST)
            result = fail_errno(e, errno, "cannot make the link /dev/%s", LINKS[i][0]);
    close(dev);
    return result;
}

static int bind_file(int root, const struct file *file, unsigned number, struct error *e) {
    char source[64];
    snprintf(source, sizeof(source), DISK "/files/%u", number);
    unlink(source);
    int fd = open(source, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || write_all(fd, file->content, file->length) < 0 || fchmod(fd, file->mode) < 0) {
        fail_errno(e, errno, "cannot write %s", file->path);
        if (fd >= 0)
            close(fd);
        return -1;
    }
    close(fd);
    int target = inside_make_file(root, file->path, file->mode);
    if (target < 0)
        return fail_errno(e, errno, "cannot make %s", file->path);
    int from = open(source, O_PATH | O_CLOEXEC);
    int result = from < 0 ? -1 : mounts_bind(from, target, 0);
    if (result < 0)
        fail_errno(e, errno, "cannot bind %s", file->path);
    if (from >= 0)
        close(from);
    close(target);
    return result;
}

static int bind_files(int root, const struct setup *setup, struct error *e) {
    mkdir(DISK "/files", 0700);
    for (unsigned i = 0; i < setup->file_count; i++)
        if (bind_file(root, &setup->files[i], i, e) < 0)
            return -1;
    return 0;
}

/* `net.ipv4.ip_forward` or, when a name has a dot in it, with `/` between. */
static int write_sysctl(const struct sysctl *sysctl, struct error *e) {
    char path[256];
    snprintf(path, sizeof(path), "%s", sysctl->key);
    if (!strchr(path, '/'))
        for (char *dot = path; (dot = strchr(dot, '.'));)
            *dot = '/';
    int proc = open("/proc/sys", O_PATH | O_DIRECTORY | O_CLOEXEC);
    struct open_how how = {.flags = O_WRONLY | O_CLOEXEC,
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV};
    int fd = proc < 0 ? -1 : (int)syscall(SYS_openat2, proc, path, &how, sizeof(how));
    int result = fd < 0 ? -1 : write_all(fd, sysctl->value, strlen(sysctl->value));
    if (result < 0)
        fail_errno(e, errno, "cannot set sysctl %s to '%s'", sysctl->key, sysctl->value);
    if (fd >= 0)
        close(fd);
    if (proc >= 0)
        close(proc);
    return result;
}

static bool absent(int number) {
    return number == ENOENT || number == ENOTDIR;
}

static int protect_read_only(int root, const char *path, struct error *e) {
    int fd = inside_open(root, path, O_PATH, 0);
    if (fd < 0)
        return absent(errno) ? 0 : fail_errno(e, errno, "read-only path %s", path);
    int result = mounts_bind(fd, fd, MOUNT_ATTR_RDONLY);
    if (result < 0)
        fail_errno(e, errno, "cannot make %s read-only", path);
    close(fd);
    return result;
}

static int mask_directory(int fd) {
    int fs = fsopen("tmpfs", FSOPEN_CLOEXEC);
    int mounted = -1, result = -1;
    if (fs >= 0 && fsconfig(fs, FSCONFIG_SET_STRING, "size", "0", 0) == 0 && fsconfig(fs, FSCONFIG_SET_FLAG, "ro", NULL, 0) == 0 &&
        fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        mounted = fsmount(fs, FSMOUNT_CLOEXEC, MOUNT_ATTR_RDONLY);
    if (mounted >= 0)
        result = move_mount(mounted, "", fd, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int saved = errno;
    if (mounted >= 0)
        close(mounted);
    if (fs >= 0)
        close(fs);
    errno = saved;
    return result;
}

/* The mask of a file is our own devtmpfs's null, opened before anything of the image: CVE-2025-31133. */
static int mask(int root, int null, const char *path, struct error *e) {
    struct stat st;
    int fd = inside_open(root, path, O_PATH, 0);
    if (fd < 0)
        return absent(errno) ? 0 : fail_errno(e, errno, "masked path %s", path);
    int result = fstat(fd, &st);
    if (result == 0)
        result = S_ISDIR(st.st_mode) ? mask_directory(fd) : mounts_bind(null, fd, 0);
    if (result < 0)
        fail_errno(e, errno, "cannot mask %s", path);
    close(fd);
    return result;
}

static int protect(int root, const struct setup *setup, struct error *e) {
    int result = 0;
    for (size_t i = 0; i < setup->read_only_paths.count && result == 0; i++)
        result = protect_read_only(root, setup->read_only_paths.at[i], e);
    int null = open("/dev/null", O_PATH | O_CLOEXEC);
    for (size_t i = 0; i < setup->masked.count && result == 0; i++)
        result = mask(root, null, setup->masked.at[i], e);
    close(null);
    return result;
}

static int set_names(const struct setup *setup, struct error *e) {
    if (setup->hostname && sethostname(setup->hostname, strlen(setup->hostname)) < 0)
        return fail_errno(e, errno, "cannot set the host name '%s'", setup->hostname);
    if (setup->domainname && setdomainname(setup->domainname, strlen(setup->domainname)) < 0)
        return fail_errno(e, errno, "cannot set the domain name '%s'", setup->domainname);
    return 0;
}

static int pivot(int root, struct error *e) {
    if (fchdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        return fail_errno(e, errno, "cannot enter the root");
    return 0;
}

static bool is_copy(const struct setup *setup, const struct mount *m) {
    for (size_t i = 0; i < setup->copies.count; i++)
        if (strcmp(setup->copies.at[i], m->destination) == 0)
            return true;
    return false;
}

/* What the root itself has where volumes are to be, before any mount hides it: a descriptor for each mount, or -1. */
static int *open_originals(int root, const struct setup *setup) {
    int *originals = calloc(setup->mount_count + 1, sizeof(*originals));
    for (size_t i = 0; originals && i < setup->mount_count; i++) {
        const struct mount *m = &setup->mounts[i];
        originals[i] = is_copy(setup, m) ? inside_open(root, m->destination, O_RDONLY | O_DIRECTORY, 0) : -1;
    }
    return originals;
}

static int apply_mounts(int root, const struct setup *setup, struct error *e) {
    int *originals = open_originals(root, setup);
    if (!originals)
        return fail(e, "Internal", "no memory for mounts");
    int binds = open(BINDS, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int result = 0;
    for (size_t i = 0; i < setup->mount_count && result == 0; i++)
        result = mounts_apply(root, binds, &setup->mounts[i], originals[i], e);
    for (size_t i = 0; i < setup->mount_count; i++)
        if (originals[i] >= 0)
            close(originals[i]);
    free(originals);
    if (binds >= 0)
        close(binds);
    return result;
}

int root_enter(const struct setup *setup, struct error *e) {
    umask(022);
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        return fail_errno(e, errno, "cannot make the mounts private");
    int root = open(ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return fail_errno(e, errno, "cannot open the root");
    int result = set_names(setup, e);
    if (result == 0)
        result = apply_mounts(root, setup, e);
    if (result == 0)
        result = make_devices(root, e);
    if (result == 0)
        result = bind_files(root, setup, e);
    for (size_t i = 0; i < setup->sysctl_count && result == 0; i++)
        result = write_sysctl(&setup->sysctls[i], e);
    if (result == 0)
        result = protect(root, setup, e);
    if (result == 0)
        result = pivot(root, e);
    close(root);
    return result;
}

int root_make_read_only(struct error *e) {
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};
    if (mount_setattr(AT_FDCWD, "/", 0, &attr, sizeof(attr)) < 0)
        return fail_errno(e, errno, "cannot make the root read-only");
    return 0;
}
