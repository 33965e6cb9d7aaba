#include "become.h"
#include "inside.h"
#include "lookup.h"
#include "reaper.h"
#include "terminal.h"
#include "users.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

void report_send(int channel, enum report_kind kind, const struct error *error, int fd) {
    struct report report = {.kind = (uint8_t)kind};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec iov = {&report, sizeof(report)};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (error)
        report.error = *error;
    if (fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof(control.bytes);
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof(int));
    }
    sendmsg(channel, &message, MSG_NOSIGNAL);
}

static void reset_signals(void) {
    sigset_t none;
    struct sigaction standard = {.sa_handler = SIG_DFL};
    for (int number = 1; number < NSIG; number++)
        sigaction(number, &standard, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static int use_stdio(struct spec *spec, const int stdio[3], int channel, bool first, struct error *e) {
    int fds[3] = {stdio[0], stdio[1], stdio[2]};
    if (setsid() < 0 && errno != EPERM)
        return fail_errno(e, errno, "setsid");
    if (spec->terminal) {
        int master, slave;
        if (terminal_make(spec, first, &master, &slave, e) < 0)
            return -1;
        report_send(channel, REPORT_TERMINAL, NULL, master);
        close(master);
        fds[0] = fds[1] = fds[2] = slave;
    }
    for (int i = 0; i < 3; i++)
        if (dup2(fds[i], i) < 0)
            return fail_errno(e, errno, "standard stream %d", i);
    if (spec->terminal && ioctl(0, TIOCSCTTY, 0) < 0)
        return fail_errno(e, errno, "controlling terminal");
    return 0;
}

/* So that a program of the user may open /dev/stdout again. */
static void own_stdio(const struct spec *spec) {
    for (int i = 0; i < 3; i++) {
        struct stat st;
        if (fstat(i, &st) == 0 && !(S_ISCHR(st.st_mode) && !spec->terminal) && st.st_uid != spec->uid)
            (void)!fchown(i, (uid_t)spec->uid, (gid_t)-1);
    }
}

static int set_limits(const struct spec *spec, struct error *e) {
    char text[32];
    snprintf(text, sizeof(text), "%lld", spec->has_oom_score_adj ? (long long)spec->oom_score_adj : 0LL);
    if (terminal_write_proc("/proc/self/oom_score_adj", text) < 0 && spec->has_oom_score_adj)
        return fail_errno(e, errno, "cannot set oom_score_adj to %s", text);
    for (size_t i = 0; i < spec->rlimit_count; i++) {
        const struct rlimit_entry *entry = &spec->rlimits[i];
        struct rlimit limit = {entry->soft, entry->hard};
        if (setrlimit((int)entry->resource, &limit) < 0)
            return fail_errno(e, errno, "cannot set rlimit %d", (int)entry->resource);
    }
    umask((mode_t)spec->umask & 0777);
    return 0;
}

static int set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    for (int i = 0; i < 2; i++) {
        data[i].effective = (uint32_t)(effective >> (32 * i));
        data[i].permitted = (uint32_t)(permitted >> (32 * i));
        data[i].inheritable = (uint32_t)(inheritable >> (32 * i));
    }
    return (int)syscall(SYS_capset, &header, data);
}

static uint64_t all_capabilities(void) {
    uint64_t all = 0;
    for (unsigned i = 0; i < 64 && prctl(PR_CAPBSET_READ, i, 0, 0, 0) >= 0; i++)
        all |= UINT64_C(1) << i;
    return all;
}

/* The bounding set goes while there is CAP_SETPCAP; permitted capabilities stay over the change of ids, for what follows. */
static int change_user(const struct spec *spec, uint64_t all, struct error *e) {
    for (unsigned i = 0; i < 64; i++)
        if ((all >> i & 1) && !(spec->capabilities[CAP_SET_BOUNDING] >> i & 1) && prctl(PR_CAPBSET_DROP, i, 0, 0, 0) < 0)
            return fail_errno(e, errno, "cannot drop capability %u", i);
    if (setgroups(spec->group_count, spec->groups) < 0)
        return fail_errno(e, errno, "cannot set %zu groups", spec->group_count);
    if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
        return fail_errno(e, errno, "cannot keep capabilities");
    if (setresgid((gid_t)spec->gid, (gid_t)spec->gid, (gid_t)spec->gid) < 0)
        return fail_errno(e, errno, "cannot become gid %u", (unsigned)spec->gid);
    if (setresuid((uid_t)spec->uid, (uid_t)spec->uid, (uid_t)spec->uid) < 0)
        return fail_errno(e, errno, "cannot become uid %u", (unsigned)spec->uid);
    prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0);
    return 0;
}

static int drop_capabilities(const struct spec *spec, uint64_t all, struct error *e) {
    uint64_t permitted = spec->capabilities[CAP_SET_PERMITTED] & all;
    uint64_t inheritable = spec->capabilities[CAP_SET_INHERITABLE] & all;
    if (set_capabilities(spec->capabilities[CAP_SET_EFFECTIVE] & permitted, permitted, inheritable) < 0)
        return fail_errno(e, errno, "cannot set capabilities");
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    for (unsigned i = 0; i < 64; i++)
        if ((spec->capabilities[CAP_SET_AMBIENT] & permitted & inheritable) >> i & 1)
            if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, i, 0, 0) < 0)
                return fail_errno(e, errno, "cannot raise ambient capability %u", i);
    return 0;
}

static int load_seccomp(const struct spec *spec, struct error *e) {
    struct sock_fprog program = {(unsigned short)(spec->seccomp_length / sizeof(struct sock_filter)), (void *)spec->seccomp};
    if (spec->seccomp_length && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0) < 0)
        return fail_errno(e, errno, "cannot load the seccomp filter of %u instructions", program.len);
    return 0;
}

/* After the change of ids, so that a directory for the user alone can be entered; getcwd(2) begins with "(unreachable)" when
 * a descriptor of the outside was the way there (CVE-2024-21626). */
static int enter_directory(const struct spec *spec, struct error *e) {
    const char *cwd = spec->cwd && *spec->cwd ? spec->cwd : "/";
    char where[4096];
    if (*cwd != '/')
        return fail(e, "InvalidRequest", "cwd '%s' is not absolute", cwd);
    if (chdir(cwd) < 0)
        return fail(e, "InvalidRequest", "chdir to cwd (\"%s\") set in config.json failed: %s", cwd, errno_text(errno));
    if (syscall(SYS_getcwd, where, sizeof(where)) < 0 || where[0] != '/')
        return fail(e, "InvalidRequest", "cwd '%s' is outside of the root", cwd);
    return 0;
}

static int prepare_environment(struct spec *spec, const char *home, struct error *e) {
    const char *now = spec_getenv(spec, "HOME");
    char *entry = NULL;
    if ((now && *now) || (asprintf(&entry, "HOME=%s", home) > 0 && strings_add(&spec->env, entry)))
        return 0;
    return fail(e, "Internal", "no memory for the environment");
}

/* With no_new_privs the filter is the last thing; without, it needs CAP_SYS_ADMIN and comes before they are dropped. */
static int become_user(struct spec *spec, char path[4096], struct error *e) {
    uint64_t all = all_capabilities();
    uint64_t effective = spec->capabilities[CAP_SET_EFFECTIVE] & all;
    if (change_user(spec, all, e) < 0)
        return -1;
    if (set_capabilities(spec->uid ? 0 : effective, all, spec->capabilities[CAP_SET_INHERITABLE] & all) < 0)
        return fail_errno(e, errno, "cannot set capabilities");
    if (enter_directory(spec, e) < 0 || program_find(spec, path, e) < 0)
        return -1;
    if (!spec->no_new_privs) {
        if (set_capabilities(all, all, spec->capabilities[CAP_SET_INHERITABLE] & all) < 0)
            return fail_errno(e, errno, "cannot set capabilities");
        return load_seccomp(spec, e) < 0 ? -1 : drop_capabilities(spec, all, e);
    }
    if (drop_capabilities(spec, all, e) < 0)
        return -1;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return fail_errno(e, errno, "cannot set no_new_privs");
    return load_seccomp(spec, e);
}

static int prepare_root(const struct spec *spec, bool read_only, struct error *e) {
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int cwd = spec->cwd && *spec->cwd == '/' ? inside_make_directory(root, spec->cwd, 0755) : -1;
    if (cwd >= 0)
        close(cwd);
    close(root);
    return read_only ? root_make_read_only(e) : 0;
}

void become(struct spec *spec, const int stdio[3], int channel, bool first, bool init, bool read_only) {
    struct error e = {0};
    char path[4096], home[256];
    reset_signals();
    if (use_stdio(spec, stdio, channel, first, &e) < 0 || (first && prepare_root(spec, read_only, &e) < 0) ||
        user_resolve(spec, home, &e) < 0 || prepare_environment(spec, home, &e) < 0 || set_limits(spec, &e) < 0)
        goto failed;
    own_stdio(spec);
    if (become_user(spec, path, &e) < 0)
        goto failed;
    if (!strings_add(&spec->args, strdup("")) || !strings_add(&spec->env, strdup(""))) {
        fail(&e, "Internal", "no memory for the arguments");
        goto failed;
    }
    spec->args.at[--spec->args.count] = NULL;
    spec->env.at[--spec->env.count] = NULL;
    if (init && first && reaper_fork(channel) != 0) {
        fail_errno(&e, errno, "cannot start the program below init");
        goto failed;
    }
    syscall(SYS_close_range, 3, ~0U, CLOSE_RANGE_CLOEXEC);
    execve(path, spec->args.at, spec->env.at);
    program_failed(path, errno, &e);
failed:
    report_send(channel, REPORT_ERROR, &e, -1);
}
