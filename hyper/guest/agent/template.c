#include "template.h"
#include "cgroup.h"
#include "setup.h"

#include <errno.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void mount_at(const char *type, const char *target, const char *options) {
    if (mkdir(target, 0755) < 0 || mount(type, target, type, 0, options) < 0)
        debug("rehearsal: %s: %s", type, errno_text(errno));
}

/* The file systems of a workload's root, in a mount namespace that ends with this process. */
static void mount_all(void) {
    mkdir(ROOT, 0755);
    if (mount("tmpfs", ROOT, "tmpfs", 0, "") < 0 || chdir(ROOT) < 0)
        return;
    mkdir("lower", 0755);
    mkdir("upper", 0755);
    mkdir("work", 0755);
    mount_at("overlay", "merged", "redirect_dir=nofollow,metacopy=off,index=off,xino=off,lowerdir=lower,upperdir=upper,workdir=work");
    mount_at("proc", "proc", NULL);
    mount_at("sysfs", "sys", NULL);
    mount_at("devpts", "pts", "newinstance");
    mount_at("mqueue", "mqueue", NULL);
    mount_at("cgroup2", "cgroup", NULL);
}

static void wait_for_all(void) {
    while (wait(NULL) >= 0 || errno == EINTR)
        ;
}

void template_rehearse(void) {
    struct error e;
    int group = cgroup_make(&e);
    if (group >= 0)
        close(group);
    if (fork() == 0) {
        if (unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWCGROUP) == 0 && fork() == 0) {
            mount_all();
            _exit(0);
        }
        wait_for_all();
        _exit(0);
    }
    wait_for_all();
    rmdir(ROOT);
}
