/* A NIC appears when the driver is bound to its virtio device, and goes when it is unbound: devices that nobody asked for yet
 * cost nothing and show nowhere. Links are configured by rtnetlink(7). */
#include "net.h"
#include "modules.h"

#include <dirent.h>
#include <errno.h>
#include <ifaddrs.h>
#include <linux/if_addr.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BUS "/sys/bus/virtio/"
enum { NETWORK = 1, MAX_DEVICES = 64, MAC_LENGTH = 6, MAX_MESSAGE = 512 };

/* What is known of the device `virtioN`: its own MAC, once the driver has told it. */
static struct device {
    bool known;
    uint8_t mac[MAC_LENGTH];
} devices[MAX_DEVICES];

struct address {
    uint64_t family, prefix;
    const uint8_t *bytes;
    size_t length;
};

struct route {
    uint64_t family, prefix, metric;
    const uint8_t *destination, *gateway; /* gateway may be NULL */
    size_t length;
};

/* NET. `addresses` and `routes` are the fields as they came. */
struct wanted {
    const uint8_t *mac, *new_mac;
    char name[IFNAMSIZ];
    uint64_t mtu;
    bool ipv6;
};

/* Devices. */

static int load_driver(struct error *e) {
    static bool loaded;
    if (!loaded) {
        modules_settle(); /* disks find their driver by themselves */
        modules_probe(false);
        modules_load("virtio:1");
        modules_probe(true);
        loaded = access(BUS "drivers/virtio_net", F_OK) == 0;
    }
    return loaded ? 0 : fail(e, "Unsupported", "the guest's kernel has no driver for network devices");
}

static bool is_network(unsigned number) {
    char path[96], text[32];
    snprintf(path, sizeof(path), BUS "devices/virtio%u/device", number);
    return read_file(path, text, sizeof(text)) > 0 && strtoul(text, NULL, 16) == NETWORK;
}

static bool is_bound(unsigned number) {
    char path[96];
    snprintf(path, sizeof(path), BUS "devices/virtio%u/driver", number);
    return access(path, F_OK) == 0;
}

static int drive(unsigned number, const char *verb) {
    char path[96], name[32];
    snprintf(path, sizeof(path), BUS "drivers/virtio_net/%s", verb);
    snprintf(name, sizeof(name), "virtio%u", number);
    return write_file(path, name);
}

/* The name that the link of a bound device has now. */
static bool link_name(unsigned number, char name[IFNAMSIZ]) {
    char path[96];
    bool found = false;
    snprintf(path, sizeof(path), BUS "devices/virtio%u/net", number);
    DIR *links = opendir(path);
    if (!links)
        return false;
    for (struct dirent *entry; !found && (entry = readdir(links));)
        if (entry->d_name[0] != '.' && strlen(entry->d_name) < IFNAMSIZ)
            found = strcpy(name, entry->d_name);
    closedir(links);
    return found;
}

static bool parse_mac(const char *text, uint8_t mac[MAC_LENGTH]) {
    return sscanf(text, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4], &mac[5]) == MAC_LENGTH;
}

/* Bind a device and learn its MAC. */
static int bring(unsigned number) {
    char path[128], name[IFNAMSIZ], text[32];
    if (drive(number, "bind") < 0 && errno != EBUSY)
        return -1;
    if (!link_name(number, name))
        return -1;
    snprintf(path, sizeof(path), BUS "devices/virtio%u/net/%s/address", number, name);
    if (!devices[number].known && read_file(path, text, sizeof(text)) > 0)
        devices[number].known = parse_mac(text, devices[number].mac);
    return 0;
}

static int number_of_mac(const uint8_t *mac) {
    for (unsigned i = 0; i < MAX_DEVICES; i++)
        if (devices[i].known && memcmp(devices[i].mac, mac, MAC_LENGTH) == 0)
            return (int)i;
    return -1;
}

/* The device with this MAC, bound. Those that are not known yet are tried in order, as the host takes them in order. */
static int bring_mac(const uint8_t *mac, struct error *e) {
    int known = number_of_mac(mac);
    if (known >= 0 && (is_bound((unsigned)known) || bring((unsigned)known) == 0))
        return known;
    for (unsigned i = 0; known < 0 && i < MAX_DEVICES; i++) {
        if (devices[i].known || !is_network(i) || bring(i) < 0)
            continue;
        if (number_of_mac(mac) == (int)i)
            return (int)i;
        drive(i, "unbind");
    }
    return fail(e, "NotFound", "the guest has no network device %02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3],
                mac[4], mac[5]);
}

/* Links. */

struct request {
    union {
        struct nlmsghdr header;
        uint8_t bytes[MAX_MESSAGE];
    };
};

static void *begin(struct request *r, uint16_t type, uint16_t flags, size_t size) {
    memset(r, 0, sizeof(*r));
    r->header.nlmsg_type = type;
    r->header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags);
    r->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(size);
    return NLMSG_DATA(&r->header);
}

/* Attributes of a NIC are small: MAX_MESSAGE holds all that one request can have. */
static void put(struct request *r, uint16_t type, const void *data, size_t length) {
    struct rtattr *attribute = (struct rtattr *)(r->bytes + NLMSG_ALIGN(r->header.nlmsg_len));
    attribute->rta_type = type;
    attribute->rta_len = (uint16_t)RTA_LENGTH(length);
    memcpy(RTA_DATA(attribute), data, length);
    r->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(r->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len));
}

/* -1 and errno. */
static int ask(int fd, struct request *r) {
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        uint8_t more[1024];
    } answer;
    if (send(fd, r, r->header.nlmsg_len, 0) < 0)
        return -1;
    ssize_t n;
    do
        n = recv(fd, &answer, sizeof(answer), 0);
    while (n < 0 && errno == EINTR);
    if (n < (ssize_t)(sizeof(answer.header) + sizeof(answer.error.error)) || answer.header.nlmsg_type != NLMSG_ERROR) {
        errno = n < 0 ? errno : EPROTO;
        return -1;
    }
    errno = -answer.error.error;
    return errno ? -1 : 0;
}

static int family_of(uint64_t family, size_t length) {
    if (family == 4 && length == 4)
        return AF_INET;
    return family == 6 && length == 16 ? AF_INET6 : -1;
}

static bool parse_address(const struct field *outer, struct address *found) {
    struct fields fields;
    struct field f;
    memset(found, 0, sizeof(*found));
    if (!fields_open(&fields, outer->data, outer->length))
        return false;
    while (fields_next(&fields, &f)) {
        if (f.tag == 1 && !field_number(&f, &found->family))
            return false;
        if (f.tag == 2) {
            found->bytes = f.data;
            found->length = f.length;
        }
        if (f.tag == 3 && !field_number(&f, &found->prefix))
            return false;
    }
    return family_of(found->family, found->length) >= 0 && found->prefix <= found->length * 8;
}

static bool parse_route(const struct field *outer, struct route *found) {
    struct fields fields;
    struct field f;
    size_t gateway = 0;
    memset(found, 0, sizeof(*found));
    if (!fields_open(&fields, outer->data, outer->length))
        return false;
    while (fields_next(&fields, &f)) {
        if ((f.tag == 1 && !field_number(&f, &found->family)) || (f.tag == 3 && !field_number(&f, &found->prefix)) ||
            (f.tag == 5 && !field_number(&f, &found->metric)))
            return false;
        if (f.tag == 2) {
            found->destination = f.data;
            found->length = f.length;
        }
        if (f.tag == 4) {
            found->gateway = f.data;
            gateway = f.length;
        }
    }
    if (found->gateway && gateway != found->length)
        return false;
    return family_of(found->family, found->length) >= 0 && found->prefix <= found->length * 8;
}

static bool parse_field(struct wanted *w, const struct field *f) {
    struct address address;
    struct route route;
    switch (f->tag) {
    case 1:
        w->mac = f->data;
        return f->length == MAC_LENGTH;
    case 2:
        if (f->length == 0 || f->length >= IFNAMSIZ || memchr(f->data, 0, f->length))
            return false;
        memcpy(w->name, f->data, f->length);
        return true;
    case 3:
        return field_number(f, &w->mtu) && w->mtu <= 65535;
    case 4:
        if (!parse_address(f, &address))
            return false;
        w->ipv6 |= address.family == 6;
        return true;
    case 5:
        return parse_route(f, &route);
    case 6:
        w->new_mac = f->data;
        return f->length == MAC_LENGTH;
    default:
        return false;
    }
}

static int parse(struct wanted *w, struct fields fields, struct error *e) {
    struct field f;
    memset(w, 0, sizeof(*w));
    while (fields_next(&fields, &f))
        if (!parse_field(w, &f))
            return fail(e, "InvalidRequest", "NET: field %u is damaged, or not of this version", f.tag);
    return w->mac ? 0 : fail(e, "InvalidRequest", "NET: no MAC");
}

/* Name, MAC and MTU; a link that is up takes no name, not even the one that it has. */
static int identify(int fd, unsigned index, const char *name, const struct wanted *w, struct error *e) {
    struct request r;
    struct ifinfomsg *link = begin(&r, RTM_NEWLINK, 0, sizeof(*link));
    uint32_t mtu = (uint32_t)w->mtu;
    link->ifi_index = (int)index;
    if (w->name[0] && strcmp(w->name, name) != 0)
        put(&r, IFLA_IFNAME, w->name, strlen(w->name) + 1);
    if (w->new_mac)
        put(&r, IFLA_ADDRESS, w->new_mac, MAC_LENGTH);
    if (mtu)
        put(&r, IFLA_MTU, &mtu, sizeof(mtu));
    return ask(fd, &r) < 0 ? fail_errno(e, errno, "cannot make the network device of the guest %s", w->name) : 0;
}

/* Addresses are the host's business: none by itself, and no waiting for whether somebody else has ours. */
static void set_protocols(const char *name, bool ipv6) {
    const char *const files[] = {"disable_ipv6", "accept_ra", "accept_dad"};
    for (size_t i = 0; i < sizeof(files) / sizeof(*files); i++) {
        char path[128];
        snprintf(path, sizeof(path), "/proc/sys/net/ipv6/conf/%s/%s", name, files[i]);
        if (write_file(path, i == 0 && !ipv6 ? "1" : "0") < 0)
            debug("%s: %s", path, errno_text(errno));
    }
}

static int set_up(int fd, unsigned index, struct error *e) {
    struct request r;
    struct ifinfomsg *link = begin(&r, RTM_NEWLINK, 0, sizeof(*link));
    link->ifi_index = (int)index;
    link->ifi_flags = link->ifi_change = IFF_UP;
    return ask(fd, &r) < 0 ? fail_errno(e, errno, "cannot set the guest's network device up") : 0;
}

static int add_address(int fd, unsigned index, const struct address *address, struct error *e) {
    struct request r;
    struct ifaddrmsg *message = begin(&r, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof(*message));
    message->ifa_family = (uint8_t)family_of(address->family, address->length);
    message->ifa_prefixlen = (uint8_t)address->prefix;
    message->ifa_flags = IFA_F_PERMANENT | (message->ifa_family == AF_INET6 ? IFA_F_NODAD : 0);
    message->ifa_index = index;
    put(&r, IFA_LOCAL, address->bytes, address->length);
    put(&r, IFA_ADDRESS, address->bytes, address->length);
    if (message->ifa_family == AF_INET && address->prefix < 31) {
        uint8_t broadcast[4];
        for (unsigned bit = 0; bit < 32; bit++) {
            uint8_t mask = (uint8_t)(0x80 >> bit % 8);
            broadcast[bit / 8] = (uint8_t)((bit % 8 ? broadcast[bit / 8] : 0) |
                                           (bit < address->prefix ? address->bytes[bit / 8] & mask : mask));
        }
        put(&r, IFA_BROADCAST, broadcast, sizeof(broadcast));
    }
    return ask(fd, &r) < 0 ? fail_errno(e, errno, "cannot give the guest an address of family IPv%u", (unsigned)address->family) : 0;
}

static bool is_wanted(struct fields fields, const struct address *have) {
    struct field f;
    struct address address;
    while (fields_next(&fields, &f))
        if (f.tag == 4 && parse_address(&f, &address) && address.length == have->length && address.prefix == have->prefix &&
            memcmp(address.bytes, have->bytes, have->length) == 0)
            return true;
    return false;
}

static uint64_t prefix_of(const uint8_t *mask, size_t length) {
    uint64_t prefix = 0;
    for (size_t i = 0; i < length; i++)
        prefix += (uint64_t)__builtin_popcount(mask[i]);
    return prefix;
}

/* Of an address and its mask; false for what is not the host's business, an address of the link alone. */
static bool address_of(const struct ifaddrs *entry, struct address *found) {
    if (!entry->ifa_addr || !entry->ifa_netmask)
        return false;
    const uint8_t *mask;
    if (entry->ifa_addr->sa_family == AF_INET) {
        *found = (struct address){.family = 4, .length = 4};
        found->bytes = (const uint8_t *)&((const struct sockaddr_in *)(const void *)entry->ifa_addr)->sin_addr;
        mask = (const uint8_t *)&((const struct sockaddr_in *)(const void *)entry->ifa_netmask)->sin_addr;
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
        *found = (struct address){.family = 6, .length = 16};
        found->bytes = (const uint8_t *)&((const struct sockaddr_in6 *)(const void *)entry->ifa_addr)->sin6_addr;
        mask = (const uint8_t *)&((const struct sockaddr_in6 *)(const void *)entry->ifa_netmask)->sin6_addr;
        if (found->bytes[0] == 0xfe && (found->bytes[1] & 0xc0) == 0x80)
            return false;
    } else {
        return false;
    }
    found->prefix = prefix_of(mask, found->length);
    return true;
}

/* Addresses that NET does not name any more, of a link that was there. Before others are added: with the first address of a
 * subnet go those that came later. */
static void drop_addresses(int fd, unsigned index, const char *name, struct fields fields) {
    struct ifaddrs *all;
    if (getifaddrs(&all) < 0)
        return;
    for (struct ifaddrs *entry = all; entry; entry = entry->ifa_next) {
        struct address have;
        if (strcmp(entry->ifa_name, name) != 0 || !address_of(entry, &have) || is_wanted(fields, &have))
            continue;
        struct request r;
        struct ifaddrmsg *message = begin(&r, RTM_DELADDR, 0, sizeof(*message));
        message->ifa_family = (uint8_t)family_of(have.family, have.length);
        message->ifa_prefixlen = (uint8_t)have.prefix;
        message->ifa_index = index;
        put(&r, IFA_LOCAL, have.bytes, have.length);
        if (ask(fd, &r) < 0)
            debug("%s: an old address: %s", name, errno_text(errno));
    }
    freeifaddrs(all);
}

static int add_route(int fd, unsigned index, const struct route *route, struct error *e) {
    struct request r;
    struct rtmsg *message = begin(&r, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof(*message));
    uint32_t metric = (uint32_t)route->metric;
    message->rtm_family = (uint8_t)family_of(route->family, route->length);
    message->rtm_dst_len = (uint8_t)route->prefix;
    message->rtm_table = RT_TABLE_MAIN;
    message->rtm_protocol = RTPROT_BOOT;
    message->rtm_scope = route->gateway ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK;
    message->rtm_type = RTN_UNICAST;
    if (route->prefix)
        put(&r, RTA_DST, route->destination, route->length);
    if (route->gateway)
        put(&r, RTA_GATEWAY, route->gateway, route->length);
    if (metric)
        put(&r, RTA_PRIORITY, &metric, sizeof(metric));
    put(&r, RTA_OIF, &index, sizeof(index));
    return ask(fd, &r) < 0 ? fail_errno(e, errno, "cannot make a route of the guest") : 0;
}

static int add_all(int fd, unsigned index, struct fields fields, struct error *e) {
    struct field f;
    struct fields again = fields;
    struct address address;
    struct route route;
    while (fields_next(&fields, &f))
        if (f.tag == 4 && parse_address(&f, &address) && add_address(fd, index, &address, e) < 0)
            return -1;
    while (fields_next(&again, &f))
        if (f.tag == 5 && parse_route(&f, &route) && add_route(fd, index, &route, e) < 0)
            return -1;
    return 0;
}

static int configure(unsigned number, const struct wanted *w, struct fields fields, struct error *e) {
    char name[IFNAMSIZ];
    if (!link_name(number, name))
        return fail(e, "Internal", "the guest's network device virtio%u has no link", number);
    unsigned index = if_nametoindex(name);
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0)
        return fail_errno(e, errno, "cannot configure the guest's network");
    int result = identify(fd, index, name, w, e);
    if (result == 0) {
        set_protocols(w->name[0] ? w->name : name, w->ipv6);
        result = set_up(fd, index, e);
    }
    if (result == 0)
        drop_addresses(fd, index, w->name[0] ? w->name : name, fields);
    if (result == 0)
        result = add_all(fd, index, fields, e);
    close(fd);
    return result;
}

int net_plug(struct fields *fields, struct error *e) {
    struct wanted w;
    if (parse(&w, *fields, e) < 0 || load_driver(e) < 0)
        return -1;
    int known = number_of_mac(w.mac);
    bool was_there = known >= 0 && is_bound((unsigned)known);
    int number = bring_mac(w.mac, e);
    int result = number < 0 ? -1 : configure((unsigned)number, &w, *fields, e);
    if (result < 0 && number >= 0 && !was_there)
        drive((unsigned)number, "unbind");
    return result;
}

int net_unplug(struct fields *fields, struct error *e) {
    struct field f;
    int number = -1;
    while (fields_next(fields, &f))
        if (f.tag == 1 && f.length == MAC_LENGTH)
            number = number_of_mac(f.data);
    if (number >= 0 && is_bound((unsigned)number) && drive((unsigned)number, "unbind") < 0)
        return fail_errno(e, errno, "cannot take the guest's network device away");
    return 0;
}
