/* Names of users and groups, as /etc/passwd and /etc/group of the current root have them. */
#ifndef AGENT_USERS_H
#define AGENT_USERS_H

#include "spec.h"

/* Resolves spec->user, `NAME|UID[:GROUP|GID]`, into uid, gid and groups, by the rules of docker's `USER`; with an empty
 * user the numbers stay. The names of spec->group_names become groups, too. `home` becomes the home directory of the user, "/" without an entry. */
int user_resolve(struct spec *spec, char home[256], struct error *e);

#endif
