/* The workload's processes as the host sees them: streams with credit, and how they end. */
#ifndef AGENT_PROCESS_H
#define AGENT_PROCESS_H

#include "port.h"

enum { STREAM_IN, STREAM_OUT, STREAM_ERR, STREAMS };
enum { CREDIT_INITIAL = 256 * 1024, CREDIT_STEP = 64 * 1024, MAX_PROCESSES = 1024 };

struct process;

/* What an epoll event of a stream points to. */
struct watch {
    struct process *process;
    int stream;
};

struct process {
    struct process *next;
    struct watch watches[STREAMS];
    uint32_t id;
    pid_t pid;
    bool terminal;
    int fds[STREAMS];     /* -1: closed, or there never was one */
    uint32_t armed[STREAMS]; /* what epoll waits for; 0: not registered */
    int peer;             /* the terminal's slave, held until the exit, so that a program may close and open it again */
    uint64_t credit[STREAMS]; /* bytes that we may send; for stdin bytes to be given back */
    int answer; /* of one that looks into the root: what it answers, instead of an exit; -1 */
    bool only_writes; /* and CLOSE_STDIN says that nobody reads what it writes */
    struct buffer input;
    size_t foreign; /* of input: bytes at its front that are no part of the host's credit, see process_resume */
    bool input_ends;
    bool exited, exit_sent, dead;
    int code;
    uint64_t exited_at; /* CLOCK_MONOTONIC, ns */
};

struct processes {
    struct process *first;
    size_t count;
    int epoll;
    struct port *port;
};

struct process *process_new(struct processes *all, uint32_t id);
struct process *process_find(struct processes *all, uint32_t id);
struct process *process_of_pid(struct processes *all, pid_t pid);
/* The descriptors become ours; they are made non-blocking and watched. */
void process_attach(struct processes *all, struct process *p, const int fds[STREAMS]);
void process_attach_terminal(struct processes *all, struct process *p, int master);

void process_input(struct processes *all, struct process *p, const uint8_t *data, size_t length);
void process_close_input(struct processes *all, struct process *p);
void process_credit(struct processes *all, struct process *p, int stream, uint64_t bytes);
int process_resize(struct process *p, uint64_t rows, uint64_t columns);
void process_ready(struct processes *all, struct watch *watch);
void process_exited(struct process *p, int status);
/* The host has changed: what is said and read from now on counts against new credits. */
void process_resume(struct processes *all, struct process *p);

/* Take up what the port's queue held back, send the exits that are due and forget what is over. Milliseconds until it is to be
 * called again, -1 for never. */
int processes_settle(struct processes *all, uint64_t oom_kills);
/* Not even an exit is sent for it. */
void process_discard(struct processes *all, struct process *p);

#endif
