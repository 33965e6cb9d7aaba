#include "process.h"
#include "fields.h"
#include "look.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const uint64_t EXIT_PATIENCE_NS = 1000000000; /* for output that descendants keep open */

struct process *process_new(struct processes *all, uint32_t id) {
    struct process *p = all->count < MAX_PROCESSES ? calloc(1, sizeof(*p)) : NULL;
    if (!p)
        return NULL;
    p->id = id;
    p->peer = p->answer = -1;
    for (int i = 0; i < STREAMS; i++) {
        p->watches[i] = (struct watch){p, i};
        p->fds[i] = -1;
        p->credit[i] = i == STREAM_IN ? 0 : CREDIT_INITIAL;
    }
    p->next = all->first;
    all->first = p;
    all->count++;
    return p;
}

struct process *process_find(struct processes *all, uint32_t id) {
    for (struct process *p = all->first; p; p = p->next)
        if (p->id == id && !p->dead)
            return p;
    return NULL;
}

struct process *process_of_pid(struct processes *all, pid_t pid) {
    for (struct process *p = all->first; p; p = p->next)
        if (p->pid == pid && !p->exited)
            return p;
    return NULL;
}

/* An end that nobody waits for is taken out, because its hang-up would be reported over and over. */
static void arm(struct processes *all, struct process *p, int stream, uint32_t events) {
    if (p->armed[stream] == events)
        return;
    struct epoll_event event = {.events = events, .data.ptr = &p->watches[stream]};
    int operation = !events ? EPOLL_CTL_DEL : p->armed[stream] ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (epoll_ctl(all->epoll, operation, p->fds[stream], &event) < 0)
        debug("epoll: process %u stream %d: %s", p->id, stream, errno_text(errno));
    p->armed[stream] = events;
}

static void close_stream(struct processes *all, struct process *p, int stream) {
    if (p->fds[stream] < 0)
        return;
    arm(all, p, stream, 0);
    close(p->fds[stream]);
    p->fds[stream] = -1;
    if (stream == STREAM_OUT)
        port_send(all->port, MSG_STDOUT_END, p->id, NULL);
    else if (stream == STREAM_ERR)
        port_send(all->port, MSG_STDERR_END, p->id, NULL);
}

static void update_output(struct processes *all, struct process *p, int stream) {
    if (p->fds[stream] >= 0)
        arm(all, p, stream, p->credit[stream] && port_queued(all->port) < PORT_OUTPUT_HIGH ? EPOLLIN : 0);
}

static void attach(struct process *p, int stream, int fd) {
    p->fds[stream] = fd;
    if (fd >= 0)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

void process_attach(struct processes *all, struct process *p, const int fds[STREAMS]) {
    for (int i = 0; i < STREAMS; i++)
        attach(p, i, fds[i]);
    update_output(all, p, STREAM_OUT);
    update_output(all, p, STREAM_ERR);
}

void process_attach_terminal(struct processes *all, struct process *p, int master) {
    p->terminal = true;
    p->peer = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    attach(p, STREAM_OUT, master);
    attach(p, STREAM_IN, fcntl(master, F_DUPFD_CLOEXEC, 3));
    update_output(all, p, STREAM_OUT);
}

static void give_input_credit(struct processes *all, struct process *p, size_t bytes) {
    size_t foreign = bytes < p->foreign ? bytes : p->foreign;
    p->foreign -= foreign;
    p->credit[STREAM_IN] += bytes - foreign;
    if (p->credit[STREAM_IN] < CREDIT_STEP)
        return;
    struct buffer body = {0};
    if (put_number(&body, 1, p->credit[STREAM_IN])) {
        port_send(all->port, MSG_STDIN_CREDIT, p->id, &body);
        p->credit[STREAM_IN] = 0;
    }
    buffer_free(&body);
}

/* A program that reads no more is no error of ours: what comes for it is dropped, and the credit given back. */
static void discard_input(struct processes *all, struct process *p) {
    size_t bytes = p->input.length;
    buffer_free(&p->input);
    close_stream(all, p, STREAM_IN);
    give_input_credit(all, p, bytes);
}

static void write_input(struct processes *all, struct process *p) {
    size_t done = 0;
    int number = 0;
    while (done < p->input.length && !number) {
        ssize_t n = write(p->fds[STREAM_IN], p->input.data + done, p->input.length - done);
        if (n >= 0)
            done += (size_t)n;
        else if (errno != EINTR)
            number = errno;
    }
    buffer_drop_front(&p->input, done);
    give_input_credit(all, p, done);
    if (number && number != EAGAIN)
        discard_input(all, p);
    else if (p->input.length)
        arm(all, p, STREAM_IN, EPOLLOUT);
    else if (p->input_ends)
        discard_input(all, p);
    else
        arm(all, p, STREAM_IN, 0);
}

void process_input(struct processes *all, struct process *p, const uint8_t *data, size_t length) {
    if (p->fds[STREAM_IN] < 0 || p->input_ends || p->input.length - p->foreign + length > CREDIT_INITIAL ||
        !buffer_append(&p->input, data, length)) {
        give_input_credit(all, p, length);
        return;
    }
    write_input(all, p);
}

/* A terminal has no end of input other than the character that its user types. */
void process_close_input(struct processes *all, struct process *p) {
    if (p->terminal || p->fds[STREAM_IN] < 0)
        return;
    p->input_ends = true;
    if (!p->input.length)
        discard_input(all, p);
}

void process_credit(struct processes *all, struct process *p, int stream, uint64_t bytes) {
    if (stream != STREAM_OUT && stream != STREAM_ERR)
        return;
    if (bytes > UINT32_MAX)
        bytes = UINT32_MAX;
    if (p->credit[stream] < UINT32_MAX)
        p->credit[stream] += bytes;
    update_output(all, p, stream);
}

int process_resize(struct process *p, uint64_t rows, uint64_t columns) {
    struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)columns};
    if (!p->terminal || p->fds[STREAM_OUT] < 0) {
        errno = ENOTTY;
        return -1;
    }
    return ioctl(p->fds[STREAM_OUT], TIOCSWINSZ, &size);
}

static void read_output(struct processes *all, struct process *p, int stream) {
    static uint8_t bytes[32768];
    size_t most = p->credit[stream] < sizeof(bytes) ? (size_t)p->credit[stream] : sizeof(bytes);
    ssize_t n = read(p->fds[stream], bytes, most);
    if (n > 0) {
        p->credit[stream] -= (uint64_t)n;
        port_send_raw(all->port, stream == STREAM_OUT ? MSG_STDOUT : MSG_STDERR, p->id, bytes, (size_t)n);
        update_output(all, p, stream);
    } else if (n == 0 || (errno != EINTR && errno != EAGAIN)) {
        close_stream(all, p, stream);
    }
}

void process_ready(struct processes *all, struct watch *watch) {
    struct process *p = watch->process;
    if (p->dead || p->fds[watch->stream] < 0 || !p->armed[watch->stream])
        return;
    if (watch->stream == STREAM_IN)
        write_input(all, p);
    else if (p->credit[watch->stream])
        read_output(all, p, watch->stream);
}

void process_exited(struct process *p, int status) {
    p->exited = true;
    p->code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    p->exited_at = now_ns(CLOCK_MONOTONIC);
    if (p->peer >= 0)
        close(p->peer);
    p->peer = -1;
}

void process_resume(struct processes *all, struct process *p) {
    p->credit[STREAM_IN] = 0;
    p->foreign = p->input.length;
    p->credit[STREAM_OUT] = p->credit[STREAM_ERR] = CREDIT_INITIAL;
    update_output(all, p, STREAM_OUT);
    update_output(all, p, STREAM_ERR);
}

static void send_exit(struct processes *all, struct process *p, uint64_t oom_kills) {
    struct buffer body = {0};
    if (p->answer >= 0) {
        uint16_t type = look_answer(p->answer, p->code, &body);
        port_send(all->port, type, p->id, &body);
        p->exit_sent = true;
    } else if (put_number(&body, 1, (uint64_t)p->code) && put_number(&body, 2, oom_kills)) {
        port_send(all->port, MSG_EXITED, p->id, &body);
        p->exit_sent = true;
    }
    buffer_free(&body);
}

/* -1, or the milliseconds after which the exit is due although output is open. */
static int settle(struct processes *all, struct process *p, uint64_t oom_kills) {
    bool open = p->fds[STREAM_OUT] >= 0 || p->fds[STREAM_ERR] >= 0;
    update_output(all, p, STREAM_OUT);
    update_output(all, p, STREAM_ERR);
    if (!p->exited || p->dead)
        return -1;
    uint64_t waited = now_ns(CLOCK_MONOTONIC) - p->exited_at;
    if (!p->exit_sent && open && p->answer >= 0)
        return -1; /* its end of the streams is its own: they end with it, once the host has taken all */
    if (!p->exit_sent && open && waited < EXIT_PATIENCE_NS)
        return (int)((EXIT_PATIENCE_NS - waited) / 1000000) + 1;
    if (!p->exit_sent)
        send_exit(all, p, oom_kills);
    if (!open && p->exit_sent)
        process_discard(all, p);
    return -1;
}

void process_discard(struct processes *all, struct process *p) {
    p->dead = true;
    for (int i = 0; i < STREAMS; i++) {
        if (p->fds[i] < 0)
            continue;
        arm(all, p, i, 0);
        close(p->fds[i]);
        p->fds[i] = -1;
    }
    if (p->peer >= 0)
        close(p->peer);
    if (p->answer >= 0)
        close(p->answer);
    p->peer = p->answer = -1;
}

int processes_settle(struct processes *all, uint64_t oom_kills) {
    int wait = -1;
    for (struct process **at = &all->first; *at;) {
        struct process *p = *at;
        int mine = settle(all, p, oom_kills);
        if (mine >= 0 && (wait < 0 || mine < wait))
            wait = mine;
        if (!p->dead) {
            at = &p->next;
            continue;
        }
        *at = p->next;
        all->count--;
        buffer_free(&p->input);
        free(p);
    }
    return wait;
}
