/* One static program with the guest's five tools in it: the C library would
 * otherwise be in the initramfs five times. Called by tool name, either as
 * argv[0] or as the first argument. */
#include "guest.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

void sleep_until(int64_t deadline)
{
    struct timespec until = {deadline / NS_PER_S, deadline % NS_PER_S};

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        ;
}

double uptime(void)
{
    return clock_ns(CLOCK_BOOTTIME) / (double)NS_PER_S;
}

void die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

uint64_t number(const char *option, const char *text, uint64_t low, uint64_t high)
{
    char *end;
    uint64_t value;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (!isdigit((unsigned char)*text) || *end || errno || value < low || value > high)
        die("%s: '%s' is not a number from %llu to %llu", option, text,
            (unsigned long long)low, (unsigned long long)high);
    return value;
}

void publish(const char *path, const char *format, ...)
{
    static int complained;
    char text[2048], temporary[256];
    va_list arguments;
    int length, file, ok;

    va_start(arguments, format);
    length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    snprintf(temporary, sizeof temporary, "%s.new", path);
    file = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    ok = file >= 0 && length < (int)sizeof text && write(file, text, length) == length;
    if (file >= 0)
        close(file);
    if (ok && rename(temporary, path) == 0)
        return;
    if (!complained++)
        fprintf(stderr, "cannot publish %s: %s\n", path, strerror(errno));
}

int read_text(const char *path, char *buffer, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length;

    if (file < 0)
        return -1;
    length = read(file, buffer, size - 1);
    close(file);
    if (length < 0)
        return -1;
    while (length > 0 && isspace((unsigned char)buffer[length - 1]))
        length--;
    buffer[length] = 0;
    return length;
}

uint64_t checksum_words(uint64_t seed, const uint64_t *words, size_t count)
{
    uint64_t first = 0x9e3779b97f4a7c15 ^ seed, second = seed + 1;

    for (size_t i = 0; i < count; i++) {
        first += words[i];
        second += first;
    }
    return (second << 32 | second >> 32) ^ first;
}

int is_plain(const char *text)
{
    size_t length = strlen(text);

    if (length == 0 || length > 63 || text[0] == '.')
        return 0;
    while (length--)
        if (!isalnum((unsigned char)text[length]) && !strchr(".-_", text[length]))
            return 0;
    return 1;
}

static const struct {
    const char *name;
    int (*run)(int argc, char **argv);
} tools[] = {
    {"memcheck", memcheck_main},
    {"diskseq", diskseq_main},
    {"behind", behind_main},
    {"ticker", ticker_main},
    {"statusd", statusd_main},
};

int main(int argc, char **argv)
{
    for (int shift = 0; shift < 2 && shift < argc; shift++) {
        const char *slash = strrchr(argv[shift], '/');
        const char *name = slash ? slash + 1 : argv[shift];

        for (size_t i = 0; i < sizeof tools / sizeof *tools; i++)
            if (strcmp(name, tools[i].name) == 0)
                return tools[i].run(argc - shift, argv + shift);
    }
    die("usage: guest-tools memcheck|diskseq|behind|ticker|statusd ...");
}
