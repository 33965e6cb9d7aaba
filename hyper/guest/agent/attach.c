#include "attach.h"
#include "inside.h"
#include "modules.h"
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_TABLE = 4 << 20 };

/* What is attached. id: the kernel's, of the mount. */
struct attached {
    struct attached *next;
    struct mount mount;
    uint64_t id;
};

static struct attached *all;

/* Shared with the child that enters the workload's mount namespace. */
struct outcome {
    struct error error;
    uint64_t id;
};

static int mount_id(int fd, uint64_t *id) {
    struct statx status;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_MNT_ID, &status) < 0)
        return -1;
    *id = status.stx_mnt_id;
    return 0;
}

static int enter(const struct workload *w, struct error *e) {
    if (setns(w->pidfd, CLONE_NEWNS) < 0)
        return fail_errno(e, errno, "cannot enter the workload's mounts");
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    return root < 0 ? fail_errno(e, errno, "cannot open the workload's root") : root;
}

/* Nothing is to lie over the kernel's own files: a link of the image may lead there. */
static int check_target(int root, int mounted, const struct mount *m, struct error *e) {
    struct statfs fs;
    struct stat here, source;
    int result = 0, fd = inside_open(root, m->destination, O_PATH, 0);
    if (fd < 0)
        return 0; /* it is to be made */
    if (fstatfs(fd, &fs) == 0 && fs.f_type == PROC_SUPER_MAGIC)
        result = fail(e, "InvalidRequest", "mount at %s: it is in /proc", m->destination);
    else if (fstat(fd, &here) == 0 && fstat(mounted, &source) == 0 && S_ISDIR(here.st_mode) != S_ISDIR(source.st_mode))
        result = fail(e, "InvalidRequest", "mount at %s: one of source and destination is a directory, the other a file",
                      m->destination);
    close(fd);
    return result;
}

static int attach_in_child(const struct workload *w, const struct mount *m, struct outcome *outcome) {
    int binds = open(BINDS, O_PATH | O_DIRECTORY | O_CLOEXEC);
    int fd = mounts_make(binds, m, -1, &outcome->error);
    int root = fd < 0 ? -1 : enter(w, &outcome->error);
    if (root < 0 || check_target(root, fd, m, &outcome->error) < 0 || mounts_place(root, fd, m, &outcome->error) < 0)
        return -1;
    return mount_id(fd, &outcome->id) < 0 ? fail_errno(&outcome->error, errno, "cannot look at the mount") : 0;
}

/* What mountinfo says of one mount; `place` is as seen from the workload's root. */
struct line {
    uint64_t id, parent;
    char *place;
};

static void unescape(char *text) {
    char *to = text;
    for (char *from = text; *from; to++) {
        if (from[0] == '\\' && from[1] >= '0' && from[1] <= '3' && from[2] && from[3]) {
            *to = (char)((from[1] - '0') * 64 + (from[2] - '0') * 8 + (from[3] - '0'));
            from += 4;
        } else {
            *to = *from++;
        }
    }
    *to = 0;
}

/* The mount `id` and those below it, each behind what it is mounted on; NULL without memory. */
static struct line *tree_of(char *table, uint64_t id, size_t *count) {
    struct line *found = NULL;
    *count = 0;
    for (char *rest = table, *text; (text = strsep(&rest, "\n"));) {
        struct line line = {0};
        char place[PATH_MAX];
        if (sscanf(text, "%" SCNu64 " %" SCNu64 " %*s %*s %4095s", &line.id, &line.parent, place) != 3)
            continue;
        bool below = line.id == id;
        for (size_t i = 0; i < *count && !below; i++)
            below = found[i].id == line.parent;
        if (!below)
            continue;
        struct line *grown = realloc(found, (*count + 1) * sizeof(*grown));
        if (!grown || !(line.place = strdup(place)))
            return NULL;
        unescape(line.place);
        found = grown;
        found[(*count)++] = line;
    }
    return found ? found : calloc(1, sizeof(*found));
}

/* By its parent and its name, so that no link is followed and nothing but this is unmounted. */
static int unmount_one(int root, const struct line *line, int flags, struct error *e) {
    char *slash = strrchr(line->place, '/');
    uint64_t id;
    if (!slash || !slash[1])
        return fail(e, "Conflict", "a mount is the root now");
    *slash = 0;
    int parent = inside_open(root, line->place[0] ? line->place : "/", O_PATH | O_DIRECTORY, RESOLVE_NO_SYMLINKS);
    *slash = '/';
    int there = parent < 0 ? -1 : openat(parent, slash + 1, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    int result = 0;
    if (there < 0 || mount_id(there, &id) < 0 || id != line->id)
        result = fail(e, "Conflict", "something else is mounted over %s", line->place);
    if (there >= 0)
        close(there);
    if (result == 0 && (fchdir(parent) < 0 || umount2(slash + 1, UMOUNT_NOFOLLOW | flags) < 0))
        result = errno == EBUSY ? fail(e, "Conflict", "%s is in use", line->place)
                                : fail_errno(e, errno, "cannot unmount %s", line->place);
    if (parent >= 0)
        close(parent);
    return result;
}

static int detach_in_child(const struct workload *w, const struct attached *a, bool force, struct outcome *outcome) {
    struct error *e = &outcome->error;
    char path[64];
    size_t count = 0;
    snprintf(path, sizeof(path), "/proc/%d/mountinfo", (int)w->pid);
    char *table = malloc(MAX_TABLE);
    struct line *lines = table && read_file(path, table, MAX_TABLE) > 0 ? tree_of(table, a->id, &count) : NULL;
    if (!lines)
        return fail(e, "Internal", "cannot read the workload's mounts");
    int root = enter(w, e);
    int result = root < 0 ? -1 : 0;
    while (count > 0 && result == 0)
        result = unmount_one(root, &lines[--count], force ? MNT_DETACH : 0, e);
    return result;
}

static int run(const struct workload *w, const struct mount *m, const struct attached *a, bool force, uint64_t *id,
               struct error *e) {
    struct outcome *outcome = mmap(NULL, sizeof(*outcome), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (outcome == MAP_FAILED)
        return fail_errno(e, errno, "no memory for a mount");
    pid_t pid = fork();
    if (pid == 0)
        _exit((m ? attach_in_child(w, m, outcome) : detach_in_child(w, a, force, outcome)) < 0);
    int status = -1;
    while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    int result = status == 0 ? 0 : -1;
    if (result < 0 && outcome->error.kind[0])
        *e = outcome->error;
    else if (result < 0)
        fail(e, "Internal", "the process that changes the mounts ended without a word");
    *id = outcome->id;
    munmap(outcome, sizeof(*outcome));
    return result;
}

static bool runs(const struct workload *w) {
    return w->state == WORKLOAD_READY || w->state == WORKLOAD_RUNNING;
}

static struct attached **find(const char *destination) {
    struct attached **at = &all;
    while (*at && strcmp((*at)->mount.destination, destination) != 0)
        at = &(*at)->next;
    return at;
}

static void forget(struct attached *a) {
    free(a->mount.destination);
    free(a->mount.type);
    free(a->mount.source);
    for (size_t i = 0; i < a->mount.options.count; i++)
        free(a->mount.options.at[i]);
    free(a->mount.options.at);
    free(a);
}

/* The slot of the disk with serial number `serial` becomes one without a driver, so that the host may empty it. */
static void leave_disk(const char *serial) {
    char name[64], path[128], target[PATH_MAX];
    struct error e;
    if (root_find_disk(serial, name, sizeof(name), &e) < 0)
        return;
    snprintf(path, sizeof(path), "/sys/block/%s/device", name);
    if (!realpath(path, target))
        return;
    *strrchr(target, '/') = 0; /* .../LNRO0005:NN/virtioN */
    char *slot = strrchr(target, '/');
    if (slot && strncmp(slot + 1, "LNRO0005:", 9) == 0)
        write_file("/sys/bus/platform/drivers/virtio-mmio/unbind", slot + 1);
}

int attach_mount(const struct workload *w, uint8_t *body, size_t length, struct error *e) {
    struct attached *a = calloc(1, sizeof(*a));
    int result = -1;
    if (!a || !mount_parse(&a->mount, body, length) || !a->mount.destination || !a->mount.type)
        fail(e, "InvalidRequest", "ATTACH is no mount");
    else if (!runs(w))
        fail(e, "Conflict", "the workload does not run");
    else if (*find(a->mount.destination))
        fail(e, "Conflict", "something is attached at %s already", a->mount.destination);
    else if (mount_is_bind(&a->mount))
        result = root_mount_binds(e);
    else
        result = 0;
    if (result == 0) {
        if (mount_is_disk(&a->mount))
            modules_look_again();
        result = run(w, &a->mount, NULL, false, &a->id, e);
        if (result < 0 && mount_is_disk(&a->mount))
            leave_disk(a->mount.source ? a->mount.source : "");
    }
    if (result < 0) {
        if (a)
            forget(a);
        return -1;
    }
    a->next = all;
    all = a;
    return 0;
}

int attach_unmount(const struct workload *w, struct fields *fields, struct error *e) {
    struct field f;
    uint64_t force = 0, id;
    char *destination = NULL;
    while (fields_next(fields, &f)) {
        if (f.tag == 1 && !destination)
            destination = field_string(&f);
        else if (f.tag == 2)
            field_number(&f, &force);
    }
    struct attached **at = destination ? find(destination) : NULL;
    if (!at || !*at) {
        fail(e, "NotFound", "nothing is attached at %s", destination ? destination : "no destination");
        free(destination);
        return -1;
    }
    free(destination);
    struct attached *a = *at;
    if (runs(w) && run(w, NULL, a, force != 0, &id, e) < 0)
        return -1;
    if (mount_is_disk(&a->mount)) {
        sync(); /* one that was in use has what was written so far */
        leave_disk(a->mount.source ? a->mount.source : "");
    } else {
        write_file("/proc/sys/vm/drop_caches", "2"); /* so that the host's server forgets its files, too */
    }
    *at = a->next;
    forget(a);
    return 0;
}
