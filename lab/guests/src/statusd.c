/* The guest's network service: one JSON document about the guest over HTTP.
 *
 * A process of its own that never forks, because a benchmark polls it several
 * times a second and a fork costs milliseconds on an emulated CPU. Connections
 * may be kept open: one that outlives a migration shows that TCP does.
 *
 *   GET  /status          the document
 *   GET  /boot_id         the boot id alone, as text
 *   POST /control/NAME    stores the body (one plain word) for the program
 *                         that reads the file NAME in the control directory
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CONNECTIONS 16

struct connection {
    int socket;
    int64_t used; /* when it last said something */
    size_t length;
    char request[2048];
};

struct service {
    const char *name;
    const char *directory; /* of the programs' status files */
    const char *control;
    char boot_id[40];
};

static void part(const struct service *service, const char *name, char *json, size_t size)
{
    char path[256];

    snprintf(path, sizeof path, "%s/%s", service->directory, name);
    if (read_text(path, json, size) <= 0)
        strcpy(json, "null");
}

static int document(const struct service *service, char *body, size_t size)
{
    char memory[1024], disk[1024], ticks[1024], behind[256];

    part(service, "memory", memory, sizeof memory);
    part(service, "disk", disk, sizeof disk);
    part(service, "ticks", ticks, sizeof ticks);
    part(service, "behind", behind, sizeof behind);
    return snprintf(body, size,
                    "{\"name\":\"%s\",\"boot_id\":\"%s\",\"uptime\":%.3f,"
                    "\"memory\":%s,\"disk\":%s,\"ticks\":%s,\"behind\":%s}\n",
                    service->name, service->boot_id, uptime(), memory, disk, ticks, behind);
}

/* Returns an HTTP status line's end, with the body set. */
static const char *answer(const struct service *service, const char *method, const char *path,
                          const char *posted, char *body, size_t size)
{
    static const char control[] = "/control/";

    *body = 0;
    if (strcmp(method, "GET") == 0) {
        if (!strcmp(path, "/status") || !strcmp(path, "/status.json") || !strcmp(path, "/"))
            document(service, body, size);
        else if (!strcmp(path, "/boot_id"))
            snprintf(body, size, "%s\n", service->boot_id);
        else
            return "404 Not Found";
        return "200 OK";
    }
    if (strcmp(method, "POST"))
        return "405 Method Not Allowed";
    if (strncmp(path, control, sizeof control - 1))
        return "404 Not Found";
    path += sizeof control - 1;
    if (is_plain(path) && is_plain(posted)) {
        char file[256];

        snprintf(file, sizeof file, "%s/%s", service->control, path);
        publish(file, "%s\n", posted);
        return "202 Accepted";
    }
    return "400 Bad Request";
}

/* Answers the first request of a connection's buffer and removes it.
 * Returns 1 when done, 0 when the request is incomplete, -1 to hang up. */
static int serve(const struct service *service, struct connection *connection)
{
    char method[8], path[128], posted[64] = "", body[4096], response[4608], *field, *end;
    size_t head, content = 0;
    const char *result;
    int length, close_after;

    connection->request[connection->length] = 0;
    end = strstr(connection->request, "\r\n\r\n");
    if (!end)
        return connection->length < sizeof connection->request - 1 ? 0 : -1;
    head = end + 4 - connection->request;
    *end = 0;
    field = strcasestr(connection->request, "\ncontent-length:");
    if (field)
        content = strtoul(field + 16, NULL, 10);
    if (content >= sizeof connection->request - head)
        return -1;
    close_after = strcasestr(connection->request, "\nconnection: close") != NULL ||
                  strstr(connection->request, " HTTP/1.0") != NULL;
    if (connection->length < head + content) {
        *end = '\r';
        return 0;
    }
    if (sscanf(connection->request, "%7s %127s", method, path) != 2)
        return -1;
    if (content < sizeof posted) {
        memcpy(posted, connection->request + head, content);
        posted[content] = 0;
        posted[strcspn(posted, "\r\n")] = 0;
    }
    result = answer(service, method, path, posted, body, sizeof body);
    length = snprintf(response, sizeof response,
                      "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
                      "Cache-Control: no-store\r\n%s\r\n%s",
                      result, *body == '{' ? "application/json" : "text/plain", strlen(body),
                      close_after ? "Connection: close\r\n" : "", body);
    connection->length -= head + content;
    memmove(connection->request, connection->request + head + content, connection->length);
    /* A reader too slow for five kilobytes is hung up on, not waited for. */
    if (send(connection->socket, response, length, MSG_NOSIGNAL | MSG_DONTWAIT) != length)
        return -1;
    return close_after ? -1 : 1;
}

static void hang_up(struct connection *connection)
{
    close(connection->socket);
    connection->socket = -1;
}

static void receive(const struct service *service, struct connection *connection)
{
    ssize_t got = recv(connection->socket, connection->request + connection->length,
                       sizeof connection->request - 1 - connection->length, MSG_DONTWAIT);
    int served;

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        hang_up(connection);
        return;
    }
    connection->length += got;
    connection->used = clock_ns(CLOCK_MONOTONIC);
    while ((served = serve(service, connection)) > 0)
        ;
    if (served < 0)
        hang_up(connection);
}

static void accept_into(int listener, struct connection *connections)
{
    struct connection *chosen = connections;
    int one = 1, socket = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

    if (socket < 0)
        return;
    /* A free place, else that of the one silent for longest: its peer may
     * have gone without a word. */
    for (struct connection *c = connections; c < connections + CONNECTIONS; c++)
        if (chosen->socket >= 0 && (c->socket < 0 || c->used < chosen->used))
            chosen = c;
    if (chosen->socket >= 0)
        hang_up(chosen);
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    chosen->socket = socket;
    chosen->length = 0;
    chosen->used = clock_ns(CLOCK_MONOTONIC);
}

static int listen_on(const char *address, uint64_t port)
{
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_port = htons(port)};
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (!inet_aton(address, &name.sin_addr))
        die("--address: '%s' is not an IPv4 address", address);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (listener < 0 || bind(listener, (struct sockaddr *)&name, sizeof name) ||
        listen(listener, CONNECTIONS))
        die("cannot listen on %s:%llu: %s", address, (unsigned long long)port, strerror(errno));
    return listener;
}

int statusd_main(int argc, char **argv)
{
    static const struct option options[] = {
        {"name", required_argument, NULL, 'n'},
        {"directory", required_argument, NULL, 'd'},
        {"control", required_argument, NULL, 'c'},
        {"address", required_argument, NULL, 'a'},
        {"port", required_argument, NULL, 'p'},
        {0},
    };
    struct service service = {"guest", "/run/vmbeam", "/run/vmbeam/control", ""};
    struct connection connections[CONNECTIONS];
    struct pollfd polled[CONNECTIONS + 1];
    const char *address = "0.0.0.0";
    uint64_t port = 80;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        switch (option) {
        case 'n': service.name = optarg; break;
        case 'd': service.directory = optarg; break;
        case 'c': service.control = optarg; break;
        case 'a': address = optarg; break;
        case 'p': port = number("--port", optarg, 1, 65535); break;
        default: return 2;
        }
    if (optind != argc || !is_plain(service.name))
        die("usage: statusd [--name NAME] [--directory DIR] [--control DIR] [--address IPV4] [--port PORT]");

    read_text("/proc/sys/kernel/random/boot_id", service.boot_id, sizeof service.boot_id);
    polled[CONNECTIONS].fd = listen_on(address, port);
    polled[CONNECTIONS].events = POLLIN;
    for (int i = 0; i < CONNECTIONS; i++)
        connections[i].socket = -1;
    for (;;) {
        for (int i = 0; i < CONNECTIONS; i++) {
            polled[i].fd = connections[i].socket; /* poll ignores -1 */
            polled[i].events = POLLIN;
        }
        if (poll(polled, CONNECTIONS + 1, -1) < 0)
            continue;
        for (int i = 0; i < CONNECTIONS; i++)
            if (polled[i].fd >= 0 && polled[i].revents)
                receive(&service, &connections[i]);
        if (polled[CONNECTIONS].revents)
            accept_into(polled[CONNECTIONS].fd, connections);
    }
}
