#include "reaper.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void end_like(int status) {
    _exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}

static void reap(pid_t program) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == program)
            end_like(status);
}

static void run(pid_t program, const sigset_t *all) {
    for (;;) {
        siginfo_t info;
        int number = sigwaitinfo(all, &info);
        if (number == SIGCHLD)
            reap(program);
        else if (number > 0)
            kill(program, number);
    }
}

pid_t reaper_fork(int channel) {
    sigset_t all, none;
    sigfillset(&all);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &all, NULL);
    pid_t program = fork();
    if (program == 0) {
        /* In a session's own process group, so that a terminal's signals reach the program and not us. */
        setpgid(0, 0);
        signal(SIGTTOU, SIG_IGN);
        (void)!tcsetpgrp(0, getpid());
        signal(SIGTTOU, SIG_DFL);
        sigprocmask(SIG_SETMASK, &none, NULL);
        return 0;
    }
    if (program < 0)
        return -1;
    prctl(PR_SET_NAME, "docker-init", 0, 0, 0);
    close(channel);
    syscall(SYS_close_range, 0, ~0U, 0);
    run(program, &all);
    return -1;
}
