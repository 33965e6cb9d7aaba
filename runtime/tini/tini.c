/* ambi-init: the first process of a container that was asked for with --init.
 *
 * ambi-init PATH ARG0 [ARG...]: runs PATH as its child, forwards every signal to it, reaps whatever ends, and exits as
 * the child did (128 + N for signal N). Freestanding: no C library, so that it is a few hundred bytes of the Python
 * package and needs nothing of the image. Build: python -m runtime.tini.build
 */
#include <asm/unistd.h>

typedef unsigned long word;

static long call6(long number, long a, long b, long c, long d)
{
	long result;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return result;
}

enum { SIGTTIN = 21, SIGTTOU = 22, SIGCHLD = 17, SIG_BLOCK = 0, SIG_SETMASK = 2, WNOHANG = 1, TIOCSPGRP = 0x5410 };
enum { ENOENT = 2, PR_SET_NAME = 15 };

static const char cannot[] = "ambi-init: cannot run the program\n";

__attribute__((noreturn)) static void leave(long status)
{
	for (;;)
		call6(__NR_exit_group, status, 0, 0, 0);
}

__attribute__((noreturn, used)) static void run(long argc, char **argv)
{
	char **envp = argv + argc + 1;
	word all = ~0UL, before = 0;
	long child, failed;

	if (argc < 3)
		leave(125);
	call6(__NR_prctl, PR_SET_NAME, (long)"ambi-init", 0, 0);
	call6(__NR_rt_sigprocmask, SIG_BLOCK, (long)&all, (long)&before, sizeof all);
	child = call6(__NR_fork, 0, 0, 0, 0);
	if (child == 0) {
		/* its own group, in the foreground if there is a terminal; all signals are still blocked, SIGTTOU too */
		long pid = call6(__NR_getpid, 0, 0, 0, 0);
		int group = (int)pid;
		call6(__NR_setpgid, 0, 0, 0, 0);
		call6(__NR_ioctl, 0, TIOCSPGRP, (long)&group, 0);
		call6(__NR_rt_sigprocmask, SIG_SETMASK, (long)&before, 0, sizeof before);
		failed = call6(__NR_execve, (long)argv[1], (long)(argv + 2), (long)envp, 0);
		call6(__NR_write, 2, (long)cannot, sizeof cannot - 1, 0);
		leave(failed == -ENOENT ? 127 : 126);
	}
	if (child < 0)
		leave(125);
	for (;;) {
		long number = call6(__NR_rt_sigtimedwait, (long)&all, 0, 0, sizeof all);
		if (number > 0 && number != SIGCHLD && number != SIGTTIN && number != SIGTTOU)
			call6(__NR_kill, child, number, 0, 0);
		for (;;) {
			int status;
			long ended = call6(__NR_wait4, -1, (long)&status, WNOHANG, 0);
			if (ended <= 0)
				break;
			if (ended == child)
				leave((status & 0x7f) ? 128 + (status & 0x7f) : (status >> 8) & 0xff);
		}
	}
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov (%rsp), %rdi\n\tlea 8(%rsp), %rsi\n\tand $-16, %rsp\n\tcall run\n");
