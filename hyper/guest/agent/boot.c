#include "boot.h"
#include "cgroup.h"
#include "modules.h"
#include "setup.h"
#include "template.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static bool command_line_has(const char *word) {
    char text[4096];
    if (read_file("/proc/cmdline", text, sizeof(text)) < 0)
        return false;
    for (char *rest = text, *each; (each = strsep(&rest, " \n"));)
        if (strcmp(each, word) == 0)
            return true;
    return false;
}

static void mount_one(const char *type, const char *target, unsigned long flags, const char *options) {
    mkdir(target, 0755);
    if (mount(type, target, type, flags, options) < 0 && errno != EBUSY)
        debug("mount %s: %s", target, errno_text(errno));
}

/* pivot_root(2) refuses to leave the initial root file system; a bind of it on top is an ordinary mount. */
static void leave_initial_mount(void) {
    if (mount("/", "/", NULL, MS_BIND, NULL) < 0 || chroot("/..") < 0 || chdir("/") < 0)
        debug("root: %s", errno_text(errno));
}

/* The console stays open, in a descriptor that nothing of ours uses: the kernel obeys SysRq on a port that is. */
static void open_standard_streams(void) {
    if (fcntl(0, F_DUPFD_CLOEXEC, 3) < 0)
        debug("console: %s", errno_text(errno));
    int fd = open("/dev/null", O_RDWR);
    for (int i = 0; fd >= 0 && i < 3; i++)
        if (fd != i)
            dup2(fd, i);
    if (fd > 2)
        close(fd);
}

static void raise_loopback(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        debug("lo: %s", errno_text(errno));
    if (fd >= 0)
        close(fd);
}

void boot(void) {
    umask(022);
    leave_initial_mount();
    mount_one("devtmpfs", "/dev", MS_NOSUID, "mode=755");
    mount_one("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_one("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    open_standard_streams();
    debug_enabled = command_line_has("ambi.debug");
    debug("agent up");
    bool template = command_line_has("ambi.template");
    if (template)
        modules_load_for_template(command_line_has("ambi.disks"));
    else
        modules_load_for_devices();
    debug("drivers loaded");
    mount_one("cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mkdir("/run", 0755);
    raise_loopback();
    if (template)
        template_rehearse();
    if (write_file("/proc/self/oom_score_adj", "-1000") < 0)
        debug("oom_score_adj: %s", errno_text(errno));
}

/* `reboot=t` on the command line: the host stops us on a reset, and the machine may have no other way to end. */
void power_off(void) {
    cgroup_kill();
    while (wait(NULL) >= 0 || errno == EINTR)
        ;
    umount2(ROOT, 0);
    umount2(DISK, 0);
    sync();
    reboot(command_line_has("reboot=t") ? RB_AUTOBOOT : RB_POWER_OFF);
    for (;;)
        pause();
}

int clock_set(uint64_t wall_ns) {
    struct timespec t = {.tv_sec = (time_t)(wall_ns / 1000000000u), .tv_nsec = (long)(wall_ns % 1000000000u)};
    return clock_settime(CLOCK_REALTIME, &t);
}

int entropy_add(const uint8_t *bytes, size_t length) {
    struct rand_pool_info *pool = malloc(sizeof(*pool) + length);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    int result = -1;
    if (pool && fd >= 0) {
        pool->entropy_count = (int)length * 8;
        pool->buf_size = (int)length;
        memcpy(pool->buf, bytes, length);
        result = ioctl(fd, RNDADDENTROPY, pool);
        if (result == 0)
            result = ioctl(fd, RNDRESEEDCRNG);
        explicit_bzero(pool, sizeof(*pool) + length);
    }
    int saved = errno;
    free(pool);
    if (fd >= 0)
        close(fd);
    errno = saved;
    return result;
}
