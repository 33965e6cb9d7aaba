/* /init of the guest: one event loop over the host's port, the workload's streams and SIGCHLD. See PROTOCOL.md. */
#include "attach.h"
#include "boot.h"
#include "cgroup.h"
#include "fields.h"
#include "net.h"
#include "look.h"
#include "sizes.h"
#include "tasks.h"
#include "workload.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef BUILD_ID
#error "BUILD_ID is given by build.py"
#endif

enum { PROTOCOL_VERSION = 1, MESSAGE_LIMIT = 8 << 20, EVENTS = 32 };

struct agent {
    struct port port;
    struct processes processes;
    struct workload workload;
    uint64_t oom_kills;
    struct buffer pending; /* the fields so far of a message that goes on */
    uint16_t pending_type;
    uint32_t pending_id;
};

static void answer_error(struct agent *a, uint32_t id, const struct error *e) {
    struct buffer body = {0};
    if (put_string(&body, 1, e->kind) && put_string(&body, 2, e->message) && (!e->hint[0] || put_string(&body, 3, e->hint)))
        port_send(&a->port, MSG_ERROR, id, &body);
    buffer_free(&body);
}

static void answer_ok(struct agent *a, uint32_t id) {
    port_send(&a->port, MSG_OK, id, NULL);
}

static void answer_result(struct agent *a, uint32_t id, int result, const struct error *e) {
    if (result < 0)
        answer_error(a, id, e);
    else
        answer_ok(a, id);
}

static void send_ready(struct agent *a) {
    struct utsname name;
    struct buffer body = {0};
    uname(&name);
    if (put_string(&body, 1, name.release))
        port_send(&a->port, MSG_READY, 0, &body);
    buffer_free(&body);
}

static void hello(struct agent *a, uint32_t id, struct fields *fields) {
    uint64_t lowest = 0, highest = 0, clock = 0;
    struct field f;
    struct error e = {0};
    while (fields_next(fields, &f)) {
        if (f.tag == 1)
            field_number(&f, &lowest);
        else if (f.tag == 2)
            field_number(&f, &highest);
        else if (f.tag == 3 && field_number(&f, &clock) && clock_set(clock) < 0)
            debug("clock: %s", errno_text(errno));
        else if (f.tag == 4 && entropy_add(f.data, f.length) < 0)
            debug("entropy: %s", errno_text(errno));
    }
    if (lowest > PROTOCOL_VERSION || highest < PROTOCOL_VERSION) {
        fail(&e, "Unsupported", "the guest speaks version %d of the guest protocol, the host %llu to %llu", PROTOCOL_VERSION,
             (unsigned long long)lowest, (unsigned long long)highest);
        answer_error(a, id, &e);
        return;
    }
    struct utsname name;
    struct buffer body = {0};
    uname(&name);
    if (put_number(&body, 1, PROTOCOL_VERSION) && put_string(&body, 2, name.release) && put_string(&body, 3, BUILD_ID))
        port_send(&a->port, MSG_HELLO_OK, id, &body);
    buffer_free(&body);
}

typedef struct process *start_function(struct workload *, struct processes *, uint32_t, uint8_t *, size_t, struct error *);

static void start(struct agent *a, start_function *function, uint32_t id, uint8_t *body, size_t length) {
    struct error e = {0};
    struct buffer answer = {0};
    struct process *p = function(&a->workload, &a->processes, id, body, length, &e);
    if (!p)
        answer_error(a, id, &e);
    else if (put_number(&answer, 1, (uint64_t)p->pid))
        port_send(&a->port, MSG_OK, id, &answer);
    buffer_free(&answer);
}

/* The numbers of fields 1 and 2. */
static void two_numbers(struct fields *fields, uint64_t values[2]) {
    struct field f;
    values[0] = values[1] = 0;
    while (fields_next(fields, &f))
        if (f.tag == 1 || f.tag == 2)
            field_number(&f, &values[f.tag - 1]);
}

/* A process that has ended takes any signal, as kill(2) of one that is not reaped does. */
static void send_signal(struct agent *a, uint32_t id, struct fields *fields) {
    uint64_t values[2];
    struct error e = {0};
    int result = 0;
    two_numbers(fields, values);
    struct process *p = process_find(&a->processes, id);
    if (values[0] < 1 || values[0] >= NSIG)
        result = fail(&e, "InvalidRequest", "%llu is no signal", (unsigned long long)values[0]);
    else if (!p)
        result = fail(&e, "NotFound", "no process %u in the guest", id);
    else if (!p->exited && kill(p->pid, (int)values[0]) < 0)
        result = fail_errno(&e, errno, "cannot send signal %d to process %u", (int)values[0], id);
    answer_result(a, id, result, &e);
}

static void resize(struct agent *a, uint32_t id, struct fields *fields) {
    uint64_t values[2];
    struct error e = {0};
    int result = 0;
    two_numbers(fields, values);
    struct process *p = process_find(&a->processes, id);
    if (!p)
        result = fail(&e, "NotFound", "no process %u in the guest", id);
    else if (process_resize(p, values[0], values[1]) < 0)
        result = fail(&e, "InvalidRequest", "process %u has no terminal", id);
    answer_result(a, id, result, &e);
}

static void credit(struct agent *a, uint32_t id, struct fields *fields) {
    uint64_t values[2];
    struct process *p = process_find(&a->processes, id);
    two_numbers(fields, values);
    if (p && values[0] <= STREAM_ERR)
        process_credit(&a->processes, p, (int)values[0], values[1]);
}

static void answer_body(struct agent *a, uint32_t id, bool (*fill)(struct buffer *)) {
    struct buffer body = {0};
    struct error e = {0};
    if (fill(&body)) {
        port_send(&a->port, MSG_OK, id, &body);
    } else {
        fail(&e, "Internal", "no memory for the answer");
        answer_error(a, id, &e);
    }
    buffer_free(&body);
}

static int set_time(struct fields *fields, struct error *e) {
    uint64_t values[2];
    two_numbers(fields, values);
    return clock_set(values[0]) < 0 ? fail_errno(e, errno, "cannot set the guest's clock") : 0;
}

static int add_entropy(struct fields *fields, struct error *e) {
    struct field f;
    while (fields_next(fields, &f))
        if (f.tag == 1 && entropy_add(f.data, f.length) < 0)
            return fail_errno(e, errno, "cannot add entropy");
    return 0;
}

/* The fields 12 to 16 of SETUP; others are refused, so that nothing is changed that is not a limit. */
static int set_limits(uint8_t *body, size_t length, struct error *e) {
    struct setup setup;
    struct fields fields = {body, length};
    struct field f;
    while (fields_next(&fields, &f))
        if (f.tag < 12 || f.tag > 16)
            return fail(e, "InvalidRequest", "LIMITS: field %u is no limit", f.tag);
    return setup_parse(&setup, body, length, e) < 0 ? -1 : cgroup_limit(&setup.limits, e);
}

static void handle(struct agent *a, uint16_t type, uint32_t id, uint8_t *body, size_t length) {
    struct error e = {0};
    struct fields fields;
    if (!fields_open(&fields, body, length)) {
        fail(&e, "InvalidRequest", "a message of type %#x is not a sequence of fields", type);
        answer_error(a, id, &e);
        return;
    }
    length = fields.left;
    switch (type) {
    case MSG_HELLO:
        hello(a, id, &fields);
        break;
    case MSG_SETUP:
        answer_result(a, id, workload_setup(&a->workload, body, length, &e), &e);
        break;
    case MSG_RUN:
        start(a, workload_run, id, body, length);
        break;
    case MSG_EXEC:
        start(a, workload_exec, id, body, length);
        break;
    case MSG_RESUME:
        start(a, workload_resume, id, body, length);
        break;
    case MSG_SIGNAL:
        send_signal(a, id, &fields);
        break;
    case MSG_RESIZE:
        resize(a, id, &fields);
        break;
    case MSG_CREDIT:
        credit(a, id, &fields);
        break;
    case MSG_STATS:
        answer_body(a, id, cgroup_stats);
        break;
    case MSG_PROCESSES:
        answer_body(a, id, tasks_list);
        break;
    case MSG_TIME:
        answer_result(a, id, set_time(&fields, &e), &e);
        break;
    case MSG_ENTROPY:
        answer_result(a, id, add_entropy(&fields, &e), &e);
        break;
    case MSG_POWER_OFF:
        power_off();
    case MSG_PING:
        answer_ok(a, id);
        break;
    case MSG_TREE:
        if (!look_start(&a->workload, &a->processes, id, body, length, &e))
            answer_error(a, id, &e);
        break;
    case MSG_DISK_SYNC:
        sync();
        answer_ok(a, id);
        break;
    case MSG_NET:
        answer_result(a, id, net_plug(&fields, &e), &e);
        break;
    case MSG_UNPLUG:
        answer_result(a, id, net_unplug(&fields, &e), &e);
        break;
    case MSG_FREEZE:
        answer_result(a, id, cgroup_freeze(&e), &e);
        break;
    case MSG_THAW:
        answer_result(a, id, cgroup_thaw(&e), &e);
        break;
    case MSG_LIMITS:
        answer_result(a, id, set_limits(body, length, &e), &e);
        break;
    case MSG_CPUS:
        answer_result(a, id, sizes_cpus(&fields, &e), &e);
        break;
    case MSG_ATTACH:
        answer_result(a, id, attach_mount(&a->workload, body, length, &e), &e);
        break;
    case MSG_DETACH:
        answer_result(a, id, attach_unmount(&a->workload, &fields, &e), &e);
        break;
    case MSG_GROW:
        answer_result(a, id, sizes_grow(&fields, &e), &e);
        break;
    default:
        fail(&e, "Unsupported", "this guest's agent does not know messages of type %#x", type);
        answer_error(a, id, &e);
    }
}

static void on_stream(struct agent *a, const struct frame *frame) {
    struct process *p = process_find(&a->processes, frame->id);
    if (p && frame->type == MSG_STDIN)
        process_input(&a->processes, p, frame->body, frame->length);
    else if (p && p->only_writes && !p->exited)
        kill(p->pid, SIGKILL);
    else if (p)
        process_close_input(&a->processes, p);
}

static bool continues(const struct agent *a, const struct frame *frame) {
    return a->pending.length && a->pending_type == frame->type && a->pending_id == frame->id;
}

/* Fields of a message of several frames are gathered; one such message at a time. */
static void on_frame(void *context, struct frame *frame) {
    struct agent *a = context;
    if (frame->type == MSG_STDIN || frame->type == MSG_CLOSE_STDIN) {
        on_stream(a, frame);
        return;
    }
    bool more = fields_end_with_more(frame->body, frame->length);
    if (!more && !continues(a, frame)) {
        handle(a, frame->type, frame->id, frame->body, frame->length);
        return;
    }
    size_t length = more ? frame->length - FIELD_HEADER : frame->length;
    struct error e = {0};
    if (a->pending.length && !continues(a, frame))
        fail(&e, "InvalidRequest", "a message was not finished before the next");
    else if (a->pending.length + length > MESSAGE_LIMIT || !buffer_append(&a->pending, frame->body, length))
        fail(&e, "InvalidRequest", "a message of type %#x is larger than %d bytes", frame->type, MESSAGE_LIMIT);
    a->pending_type = frame->type;
    a->pending_id = frame->id;
    if (more && !e.kind[0])
        return;
    struct buffer whole = a->pending;
    memset(&a->pending, 0, sizeof(a->pending));
    if (e.kind[0])
        answer_error(a, frame->id, &e);
    else
        handle(a, frame->type, frame->id, whole.data, whole.length);
    buffer_free(&whole);
}

static void on_synced(void *context) {
    struct agent *a = context;
    buffer_free(&a->pending);
    port_send_synced(&a->port);
}

static void reap(struct agent *a, int signals) {
    struct signalfd_siginfo info[8];
    while (read(signals, info, sizeof(info)) > 0)
        ;
    a->oom_kills = cgroup_oom_kills();
    for (;;) {
        int status;
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid <= 0)
            return;
        struct process *p = process_of_pid(&a->processes, pid);
        if (p)
            process_exited(p, status);
        if (pid == a->workload.pid)
            a->workload.state = WORKLOAD_OVER;
        debug("pid %d ended with status %#x", pid, status);
    }
}

static void watch(int epoll, int fd, uint32_t events, void *pointer) {
    struct epoll_event event = {.events = events, .data.ptr = pointer};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        debug("epoll: %s", errno_text(errno));
}

/* The port is watched by edges: while the host is away its hang-up is a level that would never end. */
static void serve(struct agent *a, int signals) {
    const struct frame_handler handler = {on_frame, on_synced, a};
    watch(a->processes.epoll, a->port.fd, EPOLLIN | EPOLLOUT | EPOLLET, &a->port);
    watch(a->processes.epoll, signals, EPOLLIN, &a->workload);
    for (;;) {
        struct epoll_event events[EVENTS];
        port_flush(&a->port);
        int timeout = processes_settle(&a->processes, a->oom_kills);
        port_flush(&a->port);
        int count = epoll_wait(a->processes.epoll, events, EVENTS, timeout);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == &a->port)
                port_read(&a->port, &handler);
            else if (events[i].data.ptr == &a->workload)
                reap(a, signals);
            else
                process_ready(&a->processes, events[i].data.ptr);
        }
    }
}

int main(void) {
    static struct agent a;
    sigset_t children;
    if (getpid() != 1)
        return 64;
    boot();
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    int signals = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    a.processes.epoll = epoll_create1(EPOLL_CLOEXEC);
    a.processes.port = &a.port;
    a.workload.channel = a.workload.pidfd = a.workload.cgroup = -1;
    port_open(&a.port);
    debug("port open");
    send_ready(&a);
    serve(&a, signals);
}
