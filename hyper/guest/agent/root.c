/* The workload's root file system, in the agent's own mount namespace. */
#include "modules.h"
#include "setup.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_LAYERS = 127 };

int root_find_disk(const char *serial, char *name, size_t size, struct error *e) {
    DIR *disks = opendir("/sys/block");
    bool found = false;
    if (!disks)
        return fail_errno(e, errno, "cannot read /sys/block in the guest");
    for (struct dirent *entry; !found && (entry = readdir(disks));) {
        char path[320], text[64];
        snprintf(path, sizeof(path), "/sys/block/%s/serial", entry->d_name);
        if (entry->d_name[0] == '.' || read_file(path, text, sizeof(text)) < 0)
            continue;
        text[strcspn(text, "\n")] = 0;
        if (strcmp(text, serial) == 0)
            found = snprintf(name, size, "%s", entry->d_name) < (int)size;
    }
    closedir(disks);
    return found ? 0 : fail(e, "NotFound", "the guest has no disk with serial number '%s'", serial);
}

static int mount_disk(const struct setup *setup, struct error *e) {
    char name[32], device[48];
    mkdir(DISK, 0700);
    if (!setup->disk) {
        if (mount("tmpfs", DISK, "tmpfs", MS_NOSUID | MS_NODEV, "mode=700") < 0)
            return fail_errno(e, errno, "cannot mount a tmpfs for the root's changes");
    } else {
        if (root_find_disk("disk", name, sizeof(name), e) < 0)
            return -1;
        snprintf(device, sizeof(device), "/dev/%s", name);
        if (mount(device, DISK, "ext4", MS_NOATIME, "") < 0)
            return fail_errno(e, errno, "cannot mount the writable disk %s as ext4", device);
    }
    mkdir(DISK "/fs", 0755);
    mkdir(DISK "/work", 0700);
    return 0;
}

/* Layer i at LAYERS/i: names that are short, so that 127 of them fit into the one page that mount(2) takes. */
static int mount_layers(const struct setup *setup, struct error *e) {
    char name[32];
    if (setup->layers > MAX_LAYERS)
        return fail(e, "Unsupported", "%llu layers: at most %d", (unsigned long long)setup->layers, MAX_LAYERS);
    if (root_find_disk("layers", name, sizeof(name), e) < 0)
        return -1;
    modules_load("erofs");
    modules_load("overlay");
    mkdir(LAYERS, 0700);
    for (unsigned i = 0; i < setup->layers; i++) {
        char device[64], target[32];
        snprintf(device, sizeof(device), "/dev/%s%u", name, i + 1);
        snprintf(target, sizeof(target), LAYERS "/%u", i);
        mkdir(target, 0700);
        if (mount(device, target, "erofs", MS_RDONLY, "") < 0)
            return fail_errno(e, errno, "cannot mount layer %u (%s) as EROFS", i + 1, device);
    }
    return 0;
}

static int mount_overlay(const struct setup *setup, struct error *e) {
    char options[4096];
    size_t used = (size_t)snprintf(options, sizeof(options), "redirect_dir=nofollow,metacopy=off,index=off,xino=off,upperdir=" DISK
                                                         "/fs,workdir=" DISK "/work,lowerdir=");
    for (unsigned i = (unsigned)setup->layers; i-- > 0;)
        used += (size_t)snprintf(options + used, sizeof(options) - used, "%u%s", i, i ? ":" : "");
    if (chdir(LAYERS) < 0)
        return fail_errno(e, errno, "cannot enter " LAYERS);
    int result = mount("overlay", ROOT, "overlay", 0, options);
    int saved = errno;
    if (chdir("/") < 0)
        return fail_errno(e, errno, "cannot enter /");
    return result < 0 ? fail_errno(e, saved, "cannot mount an overlay of %u layers", (unsigned)setup->layers) : 0;
}

static int mount_virtiofs(const char *tag, const char *target, struct error *e) {
    modules_load("virtiofs");
    modules_look_again();
    mkdir(target, 0755);
    if (mount(tag, target, "virtiofs", 0, "") < 0)
        return fail_errno(e, errno, "cannot mount the shared directory '%s'", tag);
    return 0;
}

int root_mount_binds(struct error *e) {
    static bool mounted;
    if (!mounted && mount_virtiofs("binds", BINDS, e) < 0)
        return -1;
    mounted = true;
    return 0;
}

/* The mount of the disk waits for reads and a flush; a process of its own, in the same mount namespace, waits for them while
 * the layers are mounted. `error` is shared with it; its kind stays empty when all is well. */
static pid_t start_mount_disk(const struct setup *setup, struct error *shared) {
    pid_t pid = fork();
    if (pid == 0)
        _exit(mount_disk(setup, shared) < 0);
    return pid;
}

static int finish_mount_disk(pid_t pid, const struct error *shared, struct error *e) {
    int status = -1;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (status == 0)
        return 0;
    if (!shared->kind[0])
        return fail(e, "Internal", "the process that mounts the writable disk ended without a word");
    *e = *shared;
    return -1;
}

static int mount_layered_root(const struct setup *setup, struct error *e) {
    struct error *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return fail_errno(e, errno, "no memory to mount the disk");
    pid_t pid = start_mount_disk(setup, shared);
    int result = pid < 0 ? fail_errno(e, errno, "cannot start a process to mount the disk") : mount_layers(setup, e);
    struct error late;
    if (pid > 0 && finish_mount_disk(pid, shared, &late) < 0 && result == 0) {
        *e = late;
        result = -1;
    }
    munmap(shared, sizeof(*shared));
    return result < 0 ? -1 : mount_overlay(setup, e);
}

static int mount_root(const struct setup *setup, struct error *e) {
    if (setup->layers && !setup->root_tag)
        return mount_layered_root(setup, e);
    if (mount_disk(setup, e) < 0)
        return -1;
    if (setup->root_tag)
        return mount_virtiofs(setup->root_tag, ROOT, e);
    if (mount(DISK "/fs", ROOT, NULL, MS_BIND, NULL) < 0)
        return fail_errno(e, errno, "cannot use the writable disk as root");
    return 0;
}

int root_assemble(const struct setup *setup, struct error *e) {
    modules_settle();
    mkdir(ROOT, 0755);
    if (mount_root(setup, e) < 0)
        return -1;
    for (size_t i = 0; i < setup->mount_count; i++)
        if (mount_is_bind(&setup->mounts[i]))
            return root_mount_binds(e);
    return 0;
}
