#include "tasks.h"
#include "fields.h"

#include <ctype.h>
#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct task {
    unsigned long ppid, uid;
    int tty;
    uint64_t started_ns, cpu_ns;
    char name[64];
};

static const char *line_of(const char *text, const char *key) {
    size_t length = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (strncmp(line, key, length) == 0)
            return line + length;
    return NULL;
}

/* A task of the workload has a number in more than our own pid namespace. */
static bool read_status(const char *pid, struct task *task) {
    char path[64], text[8192];
    snprintf(path, sizeof(path), "/proc/%s/status", pid);
    if (read_file(path, text, sizeof(text)) <= 0)
        return false;
    const char *numbers = line_of(text, "NSpid:"), *uid = line_of(text, "Uid:"), *ppid = line_of(text, "PPid:");
    if (!numbers || !uid || !ppid)
        return false;
    char *second;
    strtoul(numbers, &second, 10);
    task->uid = strtoul(uid, NULL, 10);
    task->ppid = strtoul(ppid, NULL, 10);
    return *second == '\t';
}

/* pid (name) state ppid pgrp session tty tpgid flags minflt cminflt majflt cmajflt utime stime ... starttime: proc(5). */
static bool read_stat(const char *pid, uint64_t boot_ns, struct task *task) {
    char path[64], text[2048];
    snprintf(path, sizeof(path), "/proc/%s/stat", pid);
    if (read_file(path, text, sizeof(text)) <= 0)
        return false;
    char *open = strchr(text, '('), *close = strrchr(text, ')');
    uint64_t user, system, started;
    if (!open || !close ||
        sscanf(close + 1, " %*c %*d %*d %*d %d %*d %*u %*u %*u %*u %*u %" SCNu64 " %" SCNu64 " %*d %*d %*d %*d %*d %*d %" SCNu64,
               &task->tty, &user, &system, &started) != 4)
        return false;
    uint64_t tick_ns = 1000000000u / (uint64_t)sysconf(_SC_CLK_TCK);
    task->cpu_ns = (user + system) * tick_ns;
    task->started_ns = boot_ns + started * tick_ns;
    snprintf(task->name, sizeof(task->name), "[%.*s]", (int)(close - open - 1), open + 1);
    return true;
}

static void read_command(const char *pid, const struct task *task, char *command, size_t size) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%s/cmdline", pid);
    ssize_t n = read_file(path, command, size);
    while (n > 0 && command[n - 1] == 0)
        n--;
    if (n <= 0)
        n = snprintf(command, size, "%s", task->name);
    for (ssize_t i = 0; i < n; i++)
        if (command[i] == 0)
            command[i] = ' ';
        else if (iscntrl((unsigned char)command[i]))
            command[i] = '?';
}

/* The kernel's number of a terminal: minor bits 0-7 and 20-31, major 8-19; 136 to 143 are pseudo-terminals. */
static void name_terminal(int number, char name[24]) {
    unsigned major = (unsigned)number >> 8 & 0xfff, minor = ((unsigned)number & 0xff) | ((unsigned)number >> 12 & 0xfff00);
    if (major >= 136 && major <= 143)
        snprintf(name, 24, "pts/%u", minor + (major - 136) * 256);
    else
        snprintf(name, 24, "?");
}

static bool add_task(struct buffer *body, const char *pid, uint64_t boot_ns) {
    struct task task;
    char command[4096], tty[24], line[4352];
    if (!read_status(pid, &task) || !read_stat(pid, boot_ns, &task))
        return true;
    read_command(pid, &task, command, sizeof(command));
    name_terminal(task.tty, tty);
    snprintf(line, sizeof(line), "%s %lu %lu %" PRIu64 " %" PRIu64 " %s %s", pid, task.ppid, task.uid, task.started_ns, task.cpu_ns,
             tty, command);
    return put_string(body, 1, line);
}

bool tasks_list(struct buffer *body) {
    uint64_t boot_ns = now_ns(CLOCK_REALTIME) - now_ns(CLOCK_BOOTTIME);
    DIR *proc = opendir("/proc");
    bool ok = true;
    if (!proc)
        return true;
    for (struct dirent *entry; ok && (entry = readdir(proc));)
        if (isdigit((unsigned char)entry->d_name[0]))
            ok = add_task(body, entry->d_name, boot_ns);
    closedir(proc);
    return ok;
}
