#include "terminal.h"
#include "inside.h"
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <unistd.h>

static bool is_on(int fd, long magic) {
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && fs.f_type == magic;
}

static int open_master(struct error *e) {
    int fd = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return fail_errno(e, errno, "cannot make a terminal: /dev/pts/ptmx");
    if (is_on(fd, DEVPTS_SUPER_MAGIC))
        return fd;
    close(fd);
    return fail(e, "InvalidRequest", "cannot make a terminal: /dev/pts is not a devpts");
}

/* The console is the slave seen through the workload's devpts; both ends are checked by descriptor (CVE-2025-52565). */
static int bind_console(int master, struct error *e) {
    int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    unsigned number = 0;
    char path[32];
    ioctl(master, TIOCGPTN, &number);
    snprintf(path, sizeof(path), "/dev/pts/%u", number);
    int source = inside_open(root, path, O_PATH, RESOLVE_NO_SYMLINKS);
    int target = inside_make_file(root, "/dev/console", 0600);
    int result = -1;
    if (source < 0 || target < 0)
        fail_errno(e, errno, "cannot make /dev/console");
    else if (!is_on(source, DEVPTS_SUPER_MAGIC))
        fail(e, "InvalidRequest", "cannot make /dev/console: %s is not on a devpts", path);
    else if ((result = mounts_bind(source, target, 0)) < 0)
        fail_errno(e, errno, "cannot make /dev/console");
    if (source >= 0)
        close(source);
    if (target >= 0)
        close(target);
    close(root);
    return result;
}

int terminal_make(const struct spec *spec, bool console, int *master, int *slave, struct error *e) {
    int unlocked = 0;
    struct winsize size = {.ws_row = (unsigned short)spec->rows, .ws_col = (unsigned short)spec->columns};
    *slave = -1;
    if ((*master = open_master(e)) < 0)
        return -1;
    if (ioctl(*master, TIOCSPTLCK, &unlocked) < 0 || (*slave = ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
        return fail_errno(e, errno, "cannot open the terminal");
    if ((spec->rows || spec->columns) && ioctl(*master, TIOCSWINSZ, &size) < 0)
        return fail_errno(e, errno, "cannot set the terminal's size");
    return console ? bind_console(*master, e) : 0;
}

int terminal_write_proc(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY | O_NONBLOCK);
    if (fd < 0)
        return -1;
    int result = -1;
    if (is_on(fd, PROC_SUPER_MAGIC))
        result = write_all(fd, text, strlen(text));
    else
        errno = EINVAL;
    int saved = errno;
    close(fd);
    errno = saved;
    return result;
}
