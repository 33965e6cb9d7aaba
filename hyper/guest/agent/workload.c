#include "workload.h"
#include "become.h"
#include "cgroup.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_PASSED = 4 };

/* What the agent must know of a PROCESS; the rest is parsed where it is used. */
struct outline {
    bool terminal, stdin_open;
};

static int outline_of(struct outline *outline, uint8_t *body, size_t length, struct error *e) {
    struct fields fields;
    struct field f;
    uint64_t number;
    memset(outline, 0, sizeof(*outline));
    if (!fields_open(&fields, body, length))
        return fail(e, "InvalidRequest", "PROCESS is not a sequence of fields");
    while (fields_next(&fields, &f)) {
        if (f.tag == 9 && field_number(&f, &number))
            outline->terminal = number != 0;
        if (f.tag == 12 && field_number(&f, &number))
            outline->stdin_open = number != 0;
    }
    return 0;
}

static pid_t clone_into(const struct workload *w, uint64_t flags, int *pidfd) {
    struct clone_args arguments = {
        .flags = flags | CLONE_INTO_CGROUP | CLONE_PIDFD,
        .pidfd = (uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
        .cgroup = (uint64_t)w->cgroup,
    };
    return (pid_t)syscall(SYS_clone3, &arguments, sizeof(arguments));
}

/* Fields of one message, at most MAX_PASSED of them descriptors; the count of those, or -1. */
static int receive_fds(int channel, int fds[MAX_PASSED]) {
    char byte;
    union {
        char bytes[CMSG_SPACE(MAX_PASSED * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n;
    do
        n = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (!c || c->cmsg_type != SCM_RIGHTS)
        return -1;
    size_t length = c->cmsg_len - CMSG_LEN(0);
    memcpy(fds, CMSG_DATA(c), length);
    return (int)(length / sizeof(int));
}

static int send_fds(int channel, const int *fds, size_t count) {
    char byte = 0;
    union {
        char bytes[CMSG_SPACE(MAX_PASSED * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec iov = {&byte, 1};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(c), fds, count * sizeof(int));
    return sendmsg(channel, &message, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

/* The next report: its kind, 0 at the end of the channel. A descriptor that came with it is in *fd. */
static int receive_report(int channel, struct error *e, int *fd) {
    struct report report = {0};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {&report, sizeof(report)};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n;
    do
        n = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (c && c->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(c), sizeof(int));
    if (n != sizeof(report))
        return 0;
    if (report.kind == REPORT_ERROR)
        *e = report.error;
    return report.kind;
}

static void wait_for_run(const struct setup *setup, int channel) {
    int fds[MAX_PASSED] = {-1, -1, -1, -1};
    static struct spec spec;
    struct error e = {0};
    int count = receive_fds(channel, fds);
    if (count < 1)
        return;
    off_t length = lseek(fds[0], 0, SEEK_END);
    uint8_t *body = mmap(NULL, length > 0 ? (size_t)length : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE, fds[0], 0);
    if (length < 0 || body == MAP_FAILED)
        fail_errno(&e, errno, "cannot read PROCESS");
    else if (spec_parse(&spec, body, (size_t)length, &e) == 0) {
        become(&spec, fds + 1, channel, true, setup->init != 0, setup->read_only != 0);
        return;
    }
    report_send(channel, REPORT_ERROR, &e, -1);
}

/* Not dumpable: nobody in the root reaches the agent's program through /proc/1/exe. The cgroup namespace comes after the
 * group was joined, so that it is rooted there. */
static void waiting_process(const struct setup *setup, int channel) {
    struct error e = {0};
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    dup3(channel, 3, O_CLOEXEC);
    syscall(SYS_close_range, 4, ~0U, 0);
    channel = 3;
    if (unshare(CLONE_NEWCGROUP) < 0)
        fail_errno(&e, errno, "cannot make a cgroup namespace");
    else if (root_enter(setup, &e) == 0) {
        report_send(channel, REPORT_READY, NULL, -1);
        wait_for_run(setup, channel);
        return;
    }
    report_send(channel, REPORT_ERROR, &e, -1);
}

static int start_waiting(struct workload *w, const struct setup *setup, struct error *e) {
    int pair[2], fd = -1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return fail_errno(e, errno, "cannot make a socket pair");
    w->pid = clone_into(w, CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC, &w->pidfd);
    if (w->pid == 0) {
        waiting_process(setup, pair[1]);
        _exit(255);
    }
    int saved = errno;
    close(pair[1]);
    if (w->pid < 0) {
        close(pair[0]);
        return fail_errno(e, saved, "cannot make the workload's namespaces");
    }
    w->channel = pair[0];
    int kind = receive_report(w->channel, e, &fd);
    if (kind == 0)
        return fail(e, "Internal", "the process that prepares the root ended without a word");
    return kind == REPORT_READY ? 0 : -1;
}

int workload_setup(struct workload *w, uint8_t *body, size_t length, struct error *e) {
    struct setup setup;
    if (w->state != WORKLOAD_NONE)
        return fail(e, "Conflict", "this guest is set up already");
    uint8_t *kept = malloc(length + 1); /* values point into it; a guest is set up once */
    if (!kept)
        return fail(e, "Internal", "no memory for SETUP");
    memcpy(kept, body, length);
    w->state = WORKLOAD_OVER;
    if (setup_parse(&setup, kept, length, e) < 0)
        return -1;
    debug("setup: %u layers, %zu mounts", (unsigned)setup.layers, setup.mount_count);
    if ((w->cgroup = cgroup_make(e)) < 0 || cgroup_limit(&setup.limits, e) < 0 || root_assemble(&setup, e) < 0)
        return -1;
    debug("setup: root assembled");
    w->layers = (unsigned)setup.layers;
    w->foreign_root = setup.root_tag != NULL;
    w->read_only = setup.read_only != 0;
    w->own_pid_namespace = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    if (start_waiting(w, &setup, e) < 0)
        return -1;
    w->state = WORKLOAD_READY;
    return 0;
}

struct stdio {
    int ours[STREAMS], theirs[STREAMS];
};

static void close_all(int fds[STREAMS]) {
    for (int i = 0; i < STREAMS; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
        fds[i] = -1;
    }
}

static int make_stdio(struct stdio *io, const struct outline *outline, struct error *e) {
    for (int i = 0; i < STREAMS; i++)
        io->ours[i] = io->theirs[i] = -1;
    if (outline->terminal)
        return 0;
    for (int i = 0; i < STREAMS; i++) {
        int ends[2];
        if (i == STREAM_IN && !outline->stdin_open) {
            if ((io->theirs[i] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
                goto failed;
            continue;
        }
        if (pipe2(ends, O_CLOEXEC) < 0)
            goto failed;
        io->ours[i] = ends[i == STREAM_IN];
        io->theirs[i] = ends[i != STREAM_IN];
    }
    return 0;
failed:
    fail_errno(e, errno, "cannot make standard streams");
    close_all(io->ours);
    close_all(io->theirs);
    return -1;
}

/* Follow a started process to its execve: the end of the channel. */
static int await_program(struct processes *all, struct process *p, int channel, struct stdio *io, struct error *e) {
    int kind, master = -1;
    while ((kind = receive_report(channel, e, &master)) == REPORT_TERMINAL)
        ;
    if (kind == REPORT_ERROR) {
        if (master >= 0)
            close(master);
        close_all(io->ours);
        return -1;
    }
    if (master >= 0)
        process_attach_terminal(all, p, master);
    else
        process_attach(all, p, io->ours);
    return 0;
}

static int send_process(int channel, const uint8_t *body, size_t length, const struct stdio *io, struct error *e) {
    int fds[MAX_PASSED] = {memfd_create("process", MFD_CLOEXEC), io->theirs[0], io->theirs[1], io->theirs[2]};
    size_t count = io->theirs[1] >= 0 ? MAX_PASSED : 1;
    int result = -1;
    if (fds[0] < 0 || write_all(fds[0], body, length) < 0 || (result = send_fds(channel, fds, count)) < 0)
        fail_errno(e, errno, "cannot hand the process over");
    if (fds[0] >= 0)
        close(fds[0]);
    return result;
}

static struct process *add_process(struct processes *all, uint32_t id, struct error *e) {
    struct process *p = NULL;
    if (process_find(all, id))
        fail(e, "Conflict", "process %u is there already", id);
    else if (!(p = process_new(all, id)))
        fail(e, "Conflict", "%d processes are running in the guest already", MAX_PROCESSES);
    return p;
}

struct process *workload_run(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e) {
    struct outline outline;
    struct stdio io;
    if (w->state != WORKLOAD_READY) {
        fail(e, "Conflict", "the guest is not ready to run a program: it is not set up, or ran one before");
        return NULL;
    }
    if (outline_of(&outline, body, length, e) < 0 || make_stdio(&io, &outline, e) < 0)
        return NULL;
    struct process *p = add_process(all, id, e);
    int result = p ? send_process(w->channel, body, length, &io, e) : -1;
    close_all(io.theirs);
    if (p && result == 0)
        result = await_program(all, p, w->channel, &io, e);
    else
        close_all(io.ours);
    close(w->channel);
    w->channel = -1;
    w->state = result == 0 ? WORKLOAD_RUNNING : WORKLOAD_OVER;
    if (result == 0) {
        p->pid = w->pid;
        return p;
    }
    if (p)
        process_discard(all, p);
    return NULL;
}

static void exec_process(const struct workload *w, uint8_t *body, size_t length, const struct stdio *io, int channel) {
    static struct spec spec;
    struct error e = {0};
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    if (setns(w->pidfd, CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP) < 0)
        fail(&e, "Conflict", "the workload's first process is not running");
    else if (spec_parse(&spec, body, length, &e) == 0) {
        become(&spec, io->theirs, channel, false, false, false);
        return;
    }
    report_send(channel, REPORT_ERROR, &e, -1);
}

/* The child is made in the workload's pid namespace while its parent stays the agent, which so learns of its end. */
static pid_t clone_joined(const struct workload *w, struct error *e) {
    int pidfd = -1;
    if (setns(w->pidfd, CLONE_NEWPID) < 0)
        return fail(e, "Conflict", "the workload's first process is not running");
    pid_t pid = clone_into(w, 0, &pidfd);
    int saved = errno;
    if (pid == 0)
        return 0;
    if (setns(w->own_pid_namespace, CLONE_NEWPID) < 0)
        debug("setns: %s", errno_text(errno));
    if (pid < 0)
        return saved == ENOMEM ? fail(e, "Conflict", "the workload's first process is not running")
                               : fail_errno(e, saved, "cannot start a process in the guest");
    close(pidfd);
    return pid;
}

struct process *workload_exec(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e) {
    struct outline outline;
    struct stdio io;
    int pair[2];
    if (w->state != WORKLOAD_RUNNING) {
        fail(e, "Conflict", "the workload is not running");
        return NULL;
    }
    if (outline_of(&outline, body, length, e) < 0 || make_stdio(&io, &outline, e) < 0)
        return NULL;
    struct process *p = add_process(all, id, e);
    if (!p || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0) {
        close_all(io.ours);
        close_all(io.theirs);
        if (p) {
            fail_errno(e, errno, "cannot make a socket pair");
            process_discard(all, p);
        }
        return NULL;
    }
    pid_t pid = clone_joined(w, e);
    if (pid == 0) {
        exec_process(w, body, length, &io, pair[1]);
        _exit(255);
    }
    close(pair[1]);
    close_all(io.theirs);
    int result = pid < 0 ? -1 : await_program(all, p, pair[0], &io, e);
    close(pair[0]);
    if (result == 0) {
        p->pid = pid;
        return p;
    }
    close_all(io.ours);
    process_discard(all, p);
    return NULL;
}

struct process *workload_resume(struct workload *w, struct processes *all, uint32_t id, uint8_t *body, size_t length, struct error *e) {
    (void)body;
    struct process *init = length == 0 ? process_find(all, id) : NULL;
    if (!init || init->pid != w->pid || init->exit_sent) {
        fail(e, "Conflict", "no workload runs in this guest that could go on");
        return NULL;
    }
    for (struct process *p = all->first; p; p = p->next) {
        if (p == init || p->dead)
            continue;
        if (!p->exited)
            kill(p->pid, SIGKILL);
        process_discard(all, p);
    }
    process_resume(all, init);
    return init;
}
