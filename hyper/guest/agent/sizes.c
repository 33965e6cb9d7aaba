#include "sizes.h"
#include "setup.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CPU "/sys/devices/system/cpu/cpu%u"
#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t) /* linux/ext4.h: blocks */

enum { MAX_CPUS = 1024, DISK_WAIT_MS = 5000, DISK_LOOK_MS = 5 };

static bool cpu_exists(unsigned number) {
    char path[64];
    snprintf(path, sizeof(path), CPU, number);
    return access(path, F_OK) == 0;
}

/* The first CPU has no `online`: it always is. */
static int put_on_line(unsigned number, bool on, struct error *e) {
    char path[64], text[8];
    snprintf(path, sizeof(path), CPU "/online", number);
    if (read_file(path, text, sizeof(text)) < 0 || (text[0] == '1') == on)
        return 0;
    return write_file(path, on ? "1" : "0") < 0 ? fail_errno(e, errno, "cannot take CPU %u %s line", number, on ? "on" : "off") : 0;
}

int sizes_cpus(struct fields *fields, struct error *e) {
    struct field f;
    uint64_t wanted = 0;
    unsigned count = 1;
    while (fields_next(fields, &f))
        if (f.tag == 1)
            field_number(&f, &wanted);
    while (count < MAX_CPUS && cpu_exists(count))
        count++;
    if (wanted < 1 || wanted > count)
        return fail(e, "InvalidRequest", "the guest has %u CPUs: %" PRIu64 " cannot be on line", count, wanted);
    for (unsigned number = 1; number < count; number++)
        if (put_on_line(number, number < wanted, e) < 0)
            return -1;
    return 0;
}

static uint64_t bytes_of(const char *disk) {
    char path[96], text[32];
    uint64_t sectors = 0;
    snprintf(path, sizeof(path), "/sys/block/%s/size", disk);
    if (read_file(path, text, sizeof(text)) > 0)
        sscanf(text, "%" SCNu64, &sectors);
    return sectors * 512;
}

/* The kernel looks at the device's new size when it gets to it. */
static int await_bytes(const char *disk, uint64_t bytes, struct error *e) {
    const struct timespec pause = {.tv_nsec = DISK_LOOK_MS * 1000000};
    for (int waited = 0; bytes_of(disk) < bytes; waited += DISK_LOOK_MS) {
        if (waited >= DISK_WAIT_MS)
            return fail(e, "Unavailable", "disk %s has %" PRIu64 " bytes in the guest, not %" PRIu64, disk, bytes_of(disk), bytes);
        nanosleep(&pause, NULL);
    }
    return 0;
}

static int fill_disk(int fd, uint64_t bytes, struct error *e) {
    struct stat info;
    if (fstat(fd, &info) < 0)
        return fail_errno(e, errno, "cannot look at the file system");
    uint64_t blocks = bytes / (uint64_t)info.st_blksize;
    if (ioctl(fd, EXT4_IOC_RESIZE_FS, &blocks) < 0)
        return fail_errno(e, errno, "cannot make the file system %" PRIu64 " blocks large", blocks);
    return 0;
}

int sizes_grow(struct fields *fields, struct error *e) {
    struct field f;
    char serial[32] = "", name[32];
    uint64_t bytes = 0;
    while (fields_next(fields, &f)) {
        if (f.tag == 1)
            snprintf(serial, sizeof(serial), "%.*s", (int)(f.length < 31 ? f.length : 31), (const char *)f.data);
        else if (f.tag == 2)
            field_number(&f, &bytes);
    }
    if (strcmp(serial, "disk") != 0)
        return fail(e, "Unsupported", "the guest's disk alone can grow, not '%s'", serial);
    if (root_find_disk(serial, name, sizeof(name), e) < 0 || await_bytes(name, bytes, e) < 0)
        return -1;
    int fd = open(DISK, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return fail_errno(e, errno, "cannot open the file system of the guest's disk");
    int result = fill_disk(fd, bytes_of(name), e);
    close(fd);
    return result;
}
