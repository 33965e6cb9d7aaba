/* Makes a list of system calls, here or in a new process that shares this one's memory until its last call, execve.
 *
 * Position-independent, without data: build.py takes the bytes of .text, whose first function is `calls`. See __init__.py.
 */

struct call {
	long number, arguments[6];
	long ignored; /* an errno that is no failure; -1: no errno is; 0: each is */
};

struct batch {
	struct call *calls;
	long count;
	long at;     /* out: the call that failed, or how many were made */
	long error;  /* out: its errno, or 0 */
	long result; /* out: of the last call made */
};

struct clone_args; /* linux/sched.h; its flags have CLONE_VM and CLONE_VFORK, its stack is the child's */

#define NR_EXIT_GROUP 231
#define NR_CLONE3 435
#define CLONE_ARGS_SIZE 88
#define HIGHEST_ERRNO 4095

__attribute__((section(".text.calls"))) long calls(struct batch *batch, struct clone_args *how);
__attribute__((used, noinline)) static long make(struct batch *batch);
__attribute__((used, noinline, noreturn)) static void child(struct batch *batch);

/* The child's pid or a negative errno; without `how`, what `make` returns. */
long calls(struct batch *batch, struct clone_args *how)
{
	long result = NR_CLONE3;

	if (!how)
		return make(batch);
	/* The child has the registers of this point and an empty stack: it must not return, nor look at a local. */
	__asm__ volatile("syscall\n\ttest %%rax, %%rax\n\tjnz 1f\n\tmov %%rbx, %%rdi\n\tcall child\n1:"
			 : "+a"(result)
			 : "b"(batch), "D"(how), "S"(CLONE_ARGS_SIZE)
			 : "rcx", "r11", "memory");
	return result;
}

static long call6(const struct call *call)
{
	register long fourth __asm__("r10") = call->arguments[3];
	register long fifth __asm__("r8") = call->arguments[4];
	register long sixth __asm__("r9") = call->arguments[5];
	long result = call->number;

	__asm__ volatile("syscall"
			 : "+a"(result)
			 : "D"(call->arguments[0]), "S"(call->arguments[1]), "d"(call->arguments[2]), "r"(fourth), "r"(fifth),
			   "r"(sixth)
			 : "rcx", "r11", "memory");
	return result;
}

static long make(struct batch *batch)
{
	for (batch->at = 0; batch->at < batch->count; batch->at++) {
		const struct call *call = &batch->calls[batch->at];
		long result = call6(call);

		if (result < 0 && result >= -HIGHEST_ERRNO && call->ignored != -1 && call->ignored != -result) {
			batch->error = -result;
			return -1;
		}
		batch->result = result;
	}
	return 0;
}

static void child(struct batch *batch)
{
	const struct call end = {NR_EXIT_GROUP, {125}, 0};

	make(batch);
	for (;;)
		call6(&end);
}
