#include "modules.h"
#include "util.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
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

static void load_for_device(const char *device) {
    char path[320], number[32], group[48];
    snprintf(path, sizeof(path), "/sys/bus/virtio/devices/%s/device", device);
    if (read_file(path, number, sizeof(number)) <= 0)
        return;
    snprintf(group, sizeof(group), "virtio:%lu", strtoul(number, NULL, 16));
    modules_load(group);
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

void modules_load_for_devices(void) {
    if (has_entries("/sys/bus/pci/devices"))
        modules_load("pci");
    modules_load("mmio");
    modules_load("virtio:3"); /* first: the host names its ports while we load the others */
    DIR *devices = opendir("/sys/bus/virtio/devices");
    if (!devices)
        return;
    for (struct dirent *entry; (entry = readdir(devices));)
        if (entry->d_name[0] != '.')
            load_for_device(entry->d_name);
    closedir(devices);
}
