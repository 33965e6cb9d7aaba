#include "modules.h"
#include "util.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void load(const char *name) {
    char path[128];
    snprintf(path, sizeof(path), "/modules/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return; /* loaded before: the file is removed then, its memory is the guest's */
    if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
        debug("module %s: %s", name, errno_text(errno));
    close(fd);
    unlink(path);
}

/* Lines of the list are "GROUP FILE", in the order in which a group's files are to be loaded. */
void modules_load(const char *group) {
    static char *list;
    if (!list && !(list = read_whole("/modules/order", 1 << 20)))
        return;
    size_t length = strlen(group);
    for (const char *line = list; *line;) {
        const char *end = strchrnul(line, '\n');
        if (strncmp(line, group, length) == 0 && line[length] == ' ') {
            char name[96];
            snprintf(name, sizeof(name), "%.*s", (int)(end - line - (long)length - 1), line + length + 1);
            load(name);
        }
        line = *end ? end + 1 : end;
    }
}

enum { NETWORK = 1, BLOCK = 2, CONSOLE = 3, DISK_WAITS = 5000 };

static pid_t background;
static enum { DISKS_READY, DISKS_UNBOUND, DISKS_EMPTY } disks; /* of a template: no driver yet; or a driver, and no sector */

/* Disks are read for partitions while their driver is loaded; a process of its own waits for that. */
static void load_in_background(const char *group) {
    background = fork();
    if (background > 0)
        return;
    modules_load(group);
    if (background == 0)
        _exit(0);
}

/* The type of a virtio device, as in the virtio specification, chapter 5; 0 when it is gone. */
static unsigned long type_of(const char *device) {
    char path[320], number[32];
    snprintf(path, sizeof(path), "/sys/bus/virtio/devices/%s/device", device);
    return read_file(path, number, sizeof(number)) > 0 ? strtoul(number, NULL, 16) : 0;
}

static bool has_entries(const char *path) {
    DIR *directory = opendir(path);
    bool found = false;
    if (!directory)
        return false;
    for (struct dirent *entry; !found && (entry = readdir(directory));)
        found = entry->d_name[0] != '.';
    closedir(directory);
    return found;
}

/* Those of the types that are there, as bits; types above 63 are none of ours. */
static uint64_t present_types(void) {
    DIR *devices = opendir("/sys/bus/virtio/devices");
    uint64_t types = 0;
    if (!devices)
        return 0;
    for (struct dirent *entry; (entry = readdir(devices));) {
        unsigned long type = entry->d_name[0] == '.' ? 0 : type_of(entry->d_name);
        if (type && type < 64)
            types |= UINT64_C(1) << type;
    }
    closedir(devices);
    return types;
}

void modules_probe(bool automatic) {
    if (write_file("/sys/bus/virtio/drivers_autoprobe", automatic ? "1" : "0") < 0)
        debug("drivers_autoprobe: %s", errno_text(errno));
}

static void bind_disks(void) {
    DIR *devices = opendir("/sys/bus/virtio/devices");
    if (!devices)
        return;
    for (struct dirent *entry; (entry = readdir(devices));) {
        if (entry->d_name[0] == '.' || type_of(entry->d_name) != BLOCK)
            continue;
        if (write_file("/sys/bus/virtio/drivers/virtio_blk/bind", entry->d_name) < 0)
            debug("%s: %s", entry->d_name, errno_text(errno));
    }
    closedir(devices);
}

static bool is_empty(const char *disk) {
    char path[320], size[32];
    snprintf(path, sizeof(path), "/sys/block/%s/size", disk);
    return read_file(path, size, sizeof(size)) > 0 && strtoull(size, NULL, 10) == 0;
}

/* The driver hears of the size of each from the host, and soon; partitions are then ours to ask for. */
static void look_at_disks(void) {
    DIR *all = opendir("/sys/block");
    int left = DISK_WAITS; /* milliseconds */
    if (!all)
        return;
    for (struct dirent *entry; (entry = readdir(all));) {
        char path[320];
        if (strncmp(entry->d_name, "vd", 2) != 0)
            continue;
        for (; left > 0 && is_empty(entry->d_name); left--)
            usleep(1000);
        snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || ioctl(fd, BLKRRPART) < 0)
            debug("%s: %s", entry->d_name, errno_text(errno));
        if (fd >= 0)
            close(fd);
    }
    closedir(all);
}

void modules_settle(void) {
    while (background > 0 && waitpid(background, NULL, 0) < 0 && errno == EINTR)
        ;
    background = 0;
    if (disks == DISKS_UNBOUND)
        bind_disks();
    else if (disks == DISKS_EMPTY)
        look_at_disks();
    disks = DISKS_READY;
}

/* Drivers that may bind at once: of everything but disks, NICs and the console. */
static void load_others(uint64_t types) {
    for (unsigned type = NETWORK + 1; type < 64; type++) {
        char group[16];
        snprintf(group, sizeof(group), "virtio:%u", type);
        if ((types >> type & 1) && type != BLOCK && type != CONSOLE)
            modules_load(group);
    }
}

void modules_load_for_template(bool bind_disks) {
    modules_load("mmio");
    modules_load("virtio:3");
    load_others(present_types());
    if (bind_disks)
        modules_load("virtio:2");
    modules_probe(false);
    modules_load("virtio:1");
    modules_load("virtio:2");
    modules_probe(true);
    modules_load("virtiofs");
    modules_load("erofs");
    modules_load("overlay");
    disks = bind_disks ? DISKS_EMPTY : DISKS_UNBOUND;
}

/* A slot that is still empty refuses the driver. */
void modules_look_again(void) {
    DIR *slots = opendir("/sys/bus/platform/devices");
    if (!slots)
        return;
    for (struct dirent *entry; (entry = readdir(slots));) {
        char path[320];
        snprintf(path, sizeof(path), "/sys/bus/platform/devices/%s/driver", entry->d_name);
        if (strncmp(entry->d_name, "LNRO0005:", 9) == 0 && access(path, F_OK) < 0)
            write_file("/sys/bus/platform/drivers/virtio-mmio/bind", entry->d_name);
    }
    closedir(slots);
}

void modules_load_for_devices(void) {
    if (has_entries("/sys/bus/pci/devices"))
        modules_load("pci");
    modules_load("mmio");
    uint64_t types = present_types();
    if (types >> BLOCK & 1)
        load_in_background("virtio:2");
    modules_load("virtio:3"); /* early: the host names its ports while we load the others */
    load_others(types); /* NICs: net.c */
    if (types >> BLOCK & 1) {
        modules_load("erofs");
        modules_load("overlay");
    }
}
