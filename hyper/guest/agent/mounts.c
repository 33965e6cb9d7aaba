#include "mounts.h"
#include "copy.h"
#include "inside.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

struct flag {
    const char *name;
    uint64_t set, clear; /* MOUNT_ATTR_* */
};

/* runtime-spec, config.md, "Linux mount options"; names that change nothing by default are here to be accepted. */
static const struct flag FLAGS[] = {
    {"ro", MOUNT_ATTR_RDONLY, 0},
    {"rw", 0, MOUNT_ATTR_RDONLY},
    {"nosuid", MOUNT_ATTR_NOSUID, 0},
    {"suid", 0, MOUNT_ATTR_NOSUID},
    {"nodev", MOUNT_ATTR_NODEV, 0},
    {"dev", 0, MOUNT_ATTR_NODEV},
    {"noexec", MOUNT_ATTR_NOEXEC, 0},
    {"exec", 0, MOUNT_ATTR_NOEXEC},
    {"nodiratime", MOUNT_ATTR_NODIRATIME, 0},
    {"diratime", 0, MOUNT_ATTR_NODIRATIME},
    {"nosymfollow", MOUNT_ATTR_NOSYMFOLLOW, 0},
    {"symfollow", 0, MOUNT_ATTR_NOSYMFOLLOW},
    {"noatime", MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME},
    {"strictatime", MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME},
    {"relatime", MOUNT_ATTR_RELATIME, MOUNT_ATTR__ATIME},
    {"norelatime", 0, 0},
    {"atime", 0, 0},
    {"nostrictatime", 0, 0},
    {"bind", 0, 0},
    {"rbind", 0, 0},
    {"defaults", 0, 0},
    {"async", 0, 0},
    {"nodelalloc", 0, 0},
};

static const struct {
    const char *name;
    uint64_t propagation;
    bool recursive;
} PROPAGATION[] = {
    {"private", MS_PRIVATE, false}, {"rprivate", MS_PRIVATE, true},       {"shared", MS_SHARED, false},
    {"rshared", MS_SHARED, true},   {"slave", MS_SLAVE, false},           {"rslave", MS_SLAVE, true},
    {"unbindable", MS_UNBINDABLE, false}, {"runbindable", MS_UNBINDABLE, true},
};

/* What the options ask for. `data` are those that the file system itself takes. */
struct asked {
    struct mount_attr all;       /* of the mount */
    struct mount_attr recursive; /* of the whole tree: rro and so on */
    uint64_t propagation;
    bool propagation_recursive;
    bool bind, bind_recursive;
    struct strings data;
};

static bool ask_flag(struct asked *asked, const char *option) {
    for (size_t i = 0; i < sizeof(FLAGS) / sizeof(*FLAGS); i++) {
        bool recursive = option[0] == 'r' && strcmp(option + 1, FLAGS[i].name) == 0 && (FLAGS[i].set || FLAGS[i].clear);
        if (!recursive && strcmp(option, FLAGS[i].name) != 0)
            continue;
        struct mount_attr *attr = recursive ? &asked->recursive : &asked->all;
        attr->attr_clr |= FLAGS[i].clear | FLAGS[i].set;
        attr->attr_set = (attr->attr_set & ~FLAGS[i].clear) | FLAGS[i].set;
        return true;
    }
    return false;
}

static bool ask_propagation(struct asked *asked, const char *option) {
    for (size_t i = 0; i < sizeof(PROPAGATION) / sizeof(*PROPAGATION); i++) {
        if (strcmp(option, PROPAGATION[i].name) != 0)
            continue;
        asked->propagation = PROPAGATION[i].propagation;
        asked->propagation_recursive = PROPAGATION[i].recursive;
        return true;
    }
    return false;
}

static int ask(struct asked *asked, const struct mount *m, struct error *e) {
    memset(asked, 0, sizeof(*asked));
    asked->bind = strcmp(m->type, "bind") == 0;
    for (size_t i = 0; i < m->options.count; i++) {
        char *option = m->options.at[i];
        asked->bind_recursive |= strcmp(option, "rbind") == 0;
        asked->bind |= strcmp(option, "bind") == 0 || strcmp(option, "rbind") == 0;
        if (!ask_flag(asked, option) && !ask_propagation(asked, option) && !strings_add(&asked->data, option))
            return fail(e, "Internal", "no memory for the options of mount %s", m->destination);
    }
    return 0;
}

/* mount_setattr refuses bits that are both set and cleared, but for the access time's mode, which must be cleared first. */
static int set_attributes(int fd, struct mount_attr attr, unsigned flags) {
    bool atime = (attr.attr_clr & MOUNT_ATTR__ATIME) || (attr.attr_set & MOUNT_ATTR__ATIME);
    attr.attr_clr &= ~(attr.attr_set | (uint64_t)MOUNT_ATTR__ATIME);
    if (atime)
        attr.attr_clr |= MOUNT_ATTR__ATIME;
    if (!attr.attr_set && !attr.attr_clr && !attr.propagation)
        return 0;
    return mount_setattr(fd, "", AT_EMPTY_PATH | flags, &attr, sizeof(attr));
}

static int apply_attributes(int fd, const struct asked *asked) {
    struct mount_attr propagation = {.propagation = asked->propagation};
    if (set_attributes(fd, asked->all, 0) < 0 || set_attributes(fd, asked->recursive, AT_RECURSIVE) < 0)
        return -1;
    return set_attributes(fd, propagation, asked->propagation_recursive ? AT_RECURSIVE : 0);
}

static const char *file_system(const struct mount *m) {
    if (mount_is_disk(m))
        return "ext4";
    return strcmp(m->type, "cgroup") == 0 ? "cgroup2" : m->type;
}

/* What the file system is made of: for a disk, the device with its source as serial number. */
static int source_of(const struct mount *m, char source[PATH_MAX], struct error *e) {
    char name[64];
    if (!mount_is_disk(m)) {
        snprintf(source, PATH_MAX, "%s", m->source && *m->source ? m->source : m->type);
        return 0;
    }
    if (root_find_disk(m->source ? m->source : "", name, sizeof(name), e) < 0)
        return -1;
    snprintf(source, PATH_MAX, "/dev/%s", name);
    return 0;
}

static int configure(int fs, const struct mount *m, const struct asked *asked, struct error *e) {
    char source[PATH_MAX];
    if (source_of(m, source, e) < 0)
        return -1;
    if (mount_is_disk(m) && (asked->all.attr_set & MOUNT_ATTR_RDONLY) && fsconfig(fs, FSCONFIG_SET_FLAG, "ro", NULL, 0) < 0)
        return fail_errno(e, errno, "mount %s: read-only", m->destination);
    if (fsconfig(fs, FSCONFIG_SET_STRING, "source", source, 0) < 0)
        return fail_errno(e, errno, "mount %s: source '%s'", m->destination, source);
    for (size_t i = 0; i < asked->data.count; i++) {
        char *option = asked->data.at[i], *value = strchr(option, '=');
        char key[64];
        int length = value ? (int)(value - option) : (int)strlen(option);
        snprintf(key, sizeof(key), "%.*s", length, option);
        int result = value ? fsconfig(fs, FSCONFIG_SET_STRING, key, value + 1, 0) : fsconfig(fs, FSCONFIG_SET_FLAG, key, NULL, 0);
        if (result < 0)
            return fail(e, "InvalidRequest", "mount %s: file system %s does not take the option '%s'", m->destination, m->type, option);
    }
    if (fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
        return fail_errno(e, errno, "cannot make a file system of type %s for %s", m->type, m->destination);
    return 0;
}

static int new_file_system(const struct mount *m, const struct asked *asked, struct error *e) {
    int fs = fsopen(file_system(m), FSOPEN_CLOEXEC);
    if (fs < 0)
        return fail(e, "Unsupported", "mount %s: the guest's kernel has no file system '%s'", m->destination, m->type);
    int fd = configure(fs, m, asked, e);
    if (fd == 0 && (fd = fsmount(fs, FSMOUNT_CLOEXEC, 0)) < 0)
        fail_errno(e, errno, "cannot mount %s", m->destination);
    close(fs);
    return fd;
}

static int clone_bind(int binds, const struct mount *m, const struct asked *asked, struct error *e) {
    if (asked->data.count)
        return fail(e, "InvalidRequest", "mount %s: a bind does not take the option '%s'", m->destination, asked->data.at[0]);
    int source = inside_open(binds, m->source ? m->source : "/", O_PATH, 0);
    if (source < 0)
        return fail_errno(e, errno, "bind mount %s: source '%s' in the shared directory", m->destination, m->source);
    unsigned recursive = asked->bind_recursive ? AT_RECURSIVE : 0;
    int fd = open_tree(source, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive);
    if (fd < 0)
        fail_errno(e, errno, "bind mount %s", m->destination);
    close(source);
    return fd;
}

/* procfs and sysfs only where the image has a plain directory: CVE-2019-16884, CVE-2023-27561. */
static int open_destination(int root, const struct mount *m, int mounted, struct error *e) {
    bool kernel_files = strcmp(m->type, "proc") == 0 || strcmp(m->type, "sysfs") == 0;
    struct stat st;
    int target;
    if (fstat(mounted, &st) == 0 && !S_ISDIR(st.st_mode))
        target = inside_make_file(root, m->destination, 0644);
    else
        target = inside_make_directory(root, m->destination, 0755);
    if (target < 0)
        return fail_errno(e, errno, "mount destination %s", m->destination);
    if (kernel_files) {
        close(target);
        target = inside_open(root, m->destination, O_PATH | O_DIRECTORY, RESOLVE_NO_SYMLINKS);
        if (target < 0)
            return fail(e, "InvalidRequest", "mount destination %s is a symbolic link in the image", m->destination);
    }
    return target;
}

static int fill(int mounted, int original, struct error *e) {
    int target = openat(mounted, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (target < 0)
        return errno == ENOTDIR ? 0 : fail_errno(e, errno, "cannot open a volume");
    int result = copy_into_empty(original, target, e);
    close(target);
    return result;
}

int mounts_make(int binds, const struct mount *m, int original, struct error *e) {
    struct asked asked;
    if (ask(&asked, m, e) < 0)
        return -1;
    int fd = asked.bind ? clone_bind(binds, m, &asked, e) : new_file_system(m, &asked, e);
    int result = fd;
    if (fd >= 0 && original >= 0)
        result = fill(fd, original, e);
    if (result >= 0 && apply_attributes(fd, &asked) < 0)
        result = fail_errno(e, errno, "mount %s: flags", m->destination);
    if (fd >= 0 && result < 0)
        close(fd);
    free(asked.data.at);
    return result < 0 ? -1 : fd;
}

int mounts_place(int root, int mounted, const struct mount *m, struct error *e) {
    int target = open_destination(root, m, mounted, e);
    if (target < 0)
        return -1;
    int result = move_mount(mounted, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    if (result < 0)
        fail_errno(e, errno, "cannot attach the mount %s", m->destination);
    close(target);
    return result;
}

int mounts_apply(int root, int binds, const struct mount *m, int original, struct error *e) {
    int fd = mounts_make(binds, m, original, e);
    if (fd < 0)
        return -1;
    int result = mounts_place(root, fd, m, e);
    close(fd);
    return result;
}

int mounts_bind(int source, int target, uint64_t attributes) {
    struct mount_attr attr = {.attr_set = attributes};
    int fd = open_tree(source, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
    if (fd < 0)
        return -1;
    int result = set_attributes(fd, attr, AT_RECURSIVE);
    if (result == 0)
        result = move_mount(fd, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
    int saved = errno;
    close(fd);
    errno = saved;
    return result;
}
