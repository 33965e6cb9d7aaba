#include "look.h"
#include "users.h"

#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ANSWER_LIMIT = 65536, HIGH = 64, LOWER_OPTIONS = 4096 };

#define LOWER "/run/lower"
#define BIT(capability) (1u << (capability))

static const uint32_t LOOK = BIT(CAP_DAC_READ_SEARCH), COMPARE = BIT(CAP_DAC_READ_SEARCH) | BIT(CAP_SYS_ADMIN),
                      CHANGE = BIT(CAP_CHOWN) | BIT(CAP_DAC_OVERRIDE) | BIT(CAP_FOWNER) | BIT(CAP_FSETID) | BIT(CAP_MKNOD);

struct look {
    struct tree_request request;
    char *verb, *path, *user;
    struct strings excluded;
};

static int parse(struct look *look, uint8_t *body, size_t length, struct error *e) {
    struct fields fields;
    struct field f;
    uint64_t number = 0;
    bool ok = fields_open(&fields, body, length);
    memset(look, 0, sizeof(*look));
    while (ok && fields_next(&fields, &f)) {
        if (f.tag == 1)
            ok = (look->verb = field_string(&f)) != NULL;
        else if (f.tag == 2)
            ok = (look->path = field_string(&f)) != NULL;
        else if (f.tag == 3 && (ok = field_number(&f, &number)))
            look->request.flags = (unsigned)number;
        else if (f.tag == 4)
            ok = strings_add(&look->excluded, field_string(&f));
        else if (f.tag == 5)
            ok = (look->user = field_string(&f)) != NULL;
        else if (f.tag == 6 && (ok = field_number(&f, &number)))
            look->request.uid = (uint32_t)number;
        else if (f.tag == 7 && (ok = field_number(&f, &number)))
            look->request.gid = (uint32_t)number;
    }
    if (!ok || !look->verb)
        return fail(e, "InvalidRequest", "TREE is damaged");
    if (!look->path)
        look->path = strdup("/");
    look->excluded.at = realloc(look->excluded.at, (look->excluded.count + 1) * sizeof(char *));
    if (!look->path || !look->excluded.at)
        return fail(e, "Unavailable", "no memory for TREE");
    look->excluded.at[look->excluded.count] = NULL;
    look->request.verb = look->verb;
    look->request.path = look->path;
    look->request.excluded = (const char *const *)look->excluded.at;
    return 0;
}

static void forget(struct look *look) {
    for (size_t i = 0; i < look->excluded.count; i++)
        free(look->excluded.at[i]);
    free(look->excluded.at);
    free(look->verb);
    free(look->path);
    free(look->user);
}

static bool is_verb(const struct look *look, const char *verb) {
    return strcmp(look->verb, verb) == 0;
}

static bool compares(const struct look *look) {
    return is_verb(look, "diff") || is_verb(look, "layer");
}

/* In a copy of the mounts files are files and nothing else: no devices, no programs. */
static struct mount_attr harmless(void) {
    return (struct mount_attr){.attr_set = MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, .propagation = MS_PRIVATE};
}

/* A detached copy of the mount at `path` alone. */
static int copy_mount(const char *path) {
    int copy = (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    struct mount_attr attr = harmless();
    if (copy >= 0 && syscall(SYS_mount_setattr, copy, "", AT_EMPTY_PATH, &attr, sizeof(attr)) < 0)
        return -1;
    return copy;
}

/* All mounts of the workload, in a namespace of this process: in a detached copy, the parts of a share that virtiofs mounts when
 * they are first looked at would have no place. */
static int own_mounts(bool read_only) {
    struct mount_attr attr = harmless(), more = {.attr_set = MOUNT_ATTR_RDONLY};
    if (unshare(CLONE_NEWNS) < 0 || syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &attr, sizeof(attr)) < 0)
        return -1;
    if (read_only && syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, &more, sizeof(more)) < 0)
        return -1;
    return open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* What is below the upper directory: the layers as one, which nobody can write to. */
static int open_lower(const struct workload *w, struct error *e) {
    static char options[LOWER_OPTIONS];
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        return fail_errno(e, errno, "cannot make a mount namespace");
    mkdir(LOWER, 0700);
    int result;
    if (w->layers == 0) {
        result = mount("tmpfs", LOWER, "tmpfs", MS_RDONLY, "size=4k");
    } else if (w->layers == 1) {
        result = mount(LAYERS "/0", LOWER, NULL, MS_BIND, NULL);
    } else {
        size_t used = (size_t)snprintf(options, sizeof(options), "lowerdir=");
        for (unsigned i = w->layers; i-- > 0;)
            used += (size_t)snprintf(options + used, sizeof(options) - used, "%u%s", i, i ? ":" : "");
        result = chdir(LAYERS);
        if (result == 0)
            result = mount("overlay", LOWER, "overlay", MS_RDONLY, options);
    }
    if (result < 0)
        return fail_errno(e, errno, "cannot mount the image's layers");
    return 0;
}

static int open_root(const struct workload *w, const struct look *look, struct error *e) {
    int root;
    if (compares(look)) {
        if (w->foreign_root)
            return fail(e, "Unsupported", "this root is a directory of the host, of which nobody knows what has changed");
        if (open_lower(w, e) < 0)
            return -1;
        root = copy_mount(LOWER);
    } else {
        if (setns(w->pidfd, CLONE_NEWNS) < 0)
            return fail(e, "Conflict", "the workload has just ended");
        bool early = w->read_only && w->state == WORKLOAD_READY; /* the root becomes so when the program starts */
        root = is_verb(look, "export") ? copy_mount("/") : own_mounts(early);
    }
    return root < 0 ? fail_errno(e, errno, "cannot copy the root's mounts") : root;
}

/* The descriptors as tree.h has them. */
static int arrange(const int theirs[STREAMS], int answer, bool with_upper) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    int upper = with_upper ? open(DISK "/fs", O_RDONLY | O_DIRECTORY | O_CLOEXEC) : null;
    int high[4] = {theirs[STREAM_IN] < 0 ? null : theirs[STREAM_IN], theirs[STREAM_OUT] < 0 ? null : theirs[STREAM_OUT], answer, upper};
    for (int i = 0; i < 4; i++)
        if ((high[i] = fcntl(high[i], F_DUPFD_CLOEXEC, HIGH)) < 0)
            return -1;
    return dup2(high[0], TREE_IN) < 0 || dup2(high[1], TREE_OUT) < 0 || dup2(null, 2) < 0 || dup2(high[2], TREE_ANSWER) < 0 ||
                   dup2(high[3], TREE_UPPER) < 0
               ? -1
               : 0;
}

static int own_by_user(struct look *look, struct error *e) {
    static struct spec spec;
    static char home[256];
    if (!(look->request.flags & TREE_COPY_IDS))
        return 0;
    spec.user = look->user ? look->user : strdup("");
    spec.uid = look->request.uid;
    spec.gid = look->request.gid;
    if (user_resolve(&spec, home, e) < 0)
        return -1;
    look->request.uid = (uint32_t)spec.uid;
    look->request.gid = (uint32_t)spec.gid;
    if (!spec.uid && !spec.gid)
        look->request.flags &= ~(unsigned)TREE_COPY_IDS;
    return 0;
}

/* Every right but those of `low`, of the first 32 capabilities; with CAP_SETFCAP where files are made. */
static int give_up(uint32_t low) {
    uint32_t keep[2] = {low, 0};
    if (low == CHANGE)
        keep[0] |= BIT(CAP_SETFCAP);
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2] = {{keep[0], keep[0], 0}, {keep[1], keep[1], 0}};
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || syscall(SYS_capset, &header, sets) < 0 ? -1 : 0;
}

static void report(const struct error *e) {
    struct buffer body = {0};
    if (put_string(&body, TREE_ERROR_KIND, e->kind) && put_string(&body, TREE_ERROR_MESSAGE, e->message))
        write_all(TREE_ANSWER, body.data, body.length);
    _exit(1);
}

static void look_process(const struct workload *w, struct look *look, const int theirs[STREAMS], int answer) {
    struct error e = {0};
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    if (arrange(theirs, answer, compares(look)) < 0)
        _exit(1);
    int root = open_root(w, look, &e);
    if (root < 0)
        report(&e);
    if (fchdir(root) < 0 || chroot(".") < 0) {
        fail_errno(&e, errno, "cannot enter the root");
        report(&e);
    }
    syscall(SYS_close_range, TREE_UPPER + 1, ~0U, 0);
    if (own_by_user(look, &e) < 0)
        report(&e);
    if (give_up(compares(look) ? COMPARE : is_verb(look, "put") ? CHANGE : LOOK) < 0) {
        fail_errno(&e, errno, "cannot give up rights");
        report(&e);
    }
    tree_main(&look->request);
}

static void close_pair(int pair[2]) {
    for (int i = 0; i < 2; i++)
        if (pair[i] >= 0)
            close(pair[i]);
}

static struct process *look_in(struct workload *w, struct processes *all, uint32_t id, struct look *look, struct error *e) {
    int answer[2] = {-1, -1}, stream[2] = {-1, -1};
    int ours[STREAMS] = {-1, -1, -1}, theirs[STREAMS] = {-1, -1, -1};
    int kind = is_verb(look, "stat") ? -1 : is_verb(look, "put") ? STREAM_IN : STREAM_OUT;
    struct process *p = NULL;
    if (process_find(all, id))
        fail(e, "Conflict", "process %u is there already", id);
    else if (pipe2(answer, O_CLOEXEC) < 0 || (kind >= 0 && pipe2(stream, O_CLOEXEC) < 0))
        fail_errno(e, errno, "cannot make a pipe");
    else if (!(p = process_new(all, id)))
        fail(e, "Conflict", "%d processes are running in the guest already", MAX_PROCESSES);
    if (!p) {
        close_pair(answer);
        close_pair(stream);
        return NULL;
    }
    if (kind >= 0) {
        ours[kind] = stream[kind == STREAM_IN];
        theirs[kind] = stream[kind != STREAM_IN];
    }
    pid_t pid = fork();
    if (pid == 0) {
        look_process(w, look, theirs, answer[1]);
        _exit(1);
    }
    int saved = errno;
    close(answer[1]);
    if (kind >= 0)
        close(theirs[kind]);
    p->answer = answer[0];
    p->only_writes = kind == STREAM_OUT;
    process_attach(all, p, ours);
    if (pid > 0) {
        p->pid = pid;
        return p;
    }
    process_discard(all, p);
    fail_errno(e, saved, "cannot start a process in the guest");
    return NULL;
}

struct process *look_start(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e) {
    struct look look = {0};
    struct process *p = NULL;
    if (w->state != WORKLOAD_READY && w->state != WORKLOAD_RUNNING)
        fail(e, "Conflict", "the workload is not running");
    else if (parse(&look, body, length, e) == 0)
        p = look_in(w, all, id, &look, e);
    forget(&look);
    return p;
}

uint16_t look_answer(int answer, int code, struct buffer *body) {
    static uint8_t bytes[ANSWER_LIMIT];
    struct fields fields;
    struct field f;
    fcntl(answer, F_SETFL, O_NONBLOCK);
    ssize_t n = read(answer, bytes, sizeof(bytes));
    uint16_t type = code == 0 ? MSG_OK : MSG_ERROR;
    if (n > 0 && code == 0 && buffer_append(body, bytes, (size_t)n))
        return type;
    if (n > 0 && fields_open(&fields, bytes, (size_t)n))
        while (fields_next(&fields, &f))
            put_bytes(body, f.tag == TREE_ERROR_KIND ? 1 : 2, f.data, f.length);
    else if (code) {
        put_string(body, 1, "Internal");
        put_string(body, 2, "the process that looks into the root died");
    }
    return type;
}
