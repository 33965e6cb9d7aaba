/* The guest's NICs: NET and UNPLUG. */
#ifndef AGENT_NET_H
#define AGENT_NET_H

#include "fields.h"

/* Bind the driver of the device that NET names, unless it is bound, and configure its link. */
int net_plug(struct fields *fields, struct error *e);
/* Unbind it: its link is gone. A device that is not there, or not bound, is no error. */
int net_unplug(struct fields *fields, struct error *e);

#endif
