/* A guest that becomes a template: it is saved once it waits for its host, and copies of it go on from there. */
#ifndef AGENT_TEMPLATE_H
#define AGENT_TEMPLATE_H

/* Do once what the kernel does at the first use of something, so that no copy has to. Leaves an empty cgroup, nothing else. */
void template_rehearse(void);

#endif
