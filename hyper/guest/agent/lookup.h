/* Where a program is, by the rules and in the words of Go's exec.LookPath, which docker's clients know. */
#ifndef AGENT_LOOKUP_H
#define AGENT_LOOKUP_H

#include "spec.h"

/* The path to execute for spec->args[0], in the current root and directory and with the current credentials. */
int program_find(const struct spec *spec, char path[4096], struct error *e);
/* What to say when execve(2) of `path` failed with `number`. */
int program_failed(const char *path, int number, struct error *e);

#endif
