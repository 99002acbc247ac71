/* Measures pauses as the guest sees them: the longest time between two ticks
 * of a periodic timer.
 *
 * A suspended domain's CLOCK_MONOTONIC may stand still, and its
 * CLOCK_BOOTTIME and CLOCK_REALTIME jump by what the hypervisor tells, so the
 * gap is taken in all three. None of them replaces a measurement from outside
 * the guest. */
#include "guest.h"

#include <getopt.h>
#include <stdio.h>
#include <string.h>

#define CLOCKS 3

static const clockid_t clocks[CLOCKS] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME};

struct window {
    char token[64]; /* given by whoever asked for the reset */
    double since;
    uint64_t ticks;
    uint64_t long_gaps;
    int64_t longest[CLOCKS];
};

static void begin(struct window *window, const char *token)
{
    memset(window, 0, sizeof *window);
    snprintf(window->token, sizeof window->token, "%s", token);
    window->since = uptime();
}

static void report(const struct window *window, const char *path, uint64_t interval_ms,
                   uint64_t long_ms)
{
    publish(path,
            "{\"interval_ms\":%llu,\"reset\":\"%s\",\"since\":%.3f,\"ticks\":%llu,"
            "\"longest_gap_ms\":{\"monotonic\":%.1f,\"boottime\":%.1f,\"realtime\":%.1f},"
            "\"long_gap_ms\":%llu,\"long_gaps\":%llu,\"updated\":%.3f}\n",
            (unsigned long long)interval_ms, window->token, window->since,
            (unsigned long long)window->ticks, window->longest[0] / (double)NS_PER_MS,
            window->longest[1] / (double)NS_PER_MS, window->longest[2] / (double)NS_PER_MS,
            (unsigned long long)long_ms, (unsigned long long)window->long_gaps, uptime());
}

int ticker_main(int argc, char **argv)
{
    static const struct option options[] = {
        {"interval-ms", required_argument, NULL, 'i'},
        {"long-ms", required_argument, NULL, 'l'},
        {"reset-file", required_argument, NULL, 'r'},
        {"status", required_argument, NULL, 's'},
        {"status-ms", required_argument, NULL, 'm'},
        {0},
    };
    const char *status = NULL, *reset_file = NULL;
    uint64_t interval_ms = 100, long_ms = 1000, status_ms = 1000;
    int64_t wake, reported, last[CLOCKS];
    struct window window;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
        switch (option) {
        case 'i': interval_ms = number("--interval-ms", optarg, 1, 60000); break;
        case 'l': long_ms = number("--long-ms", optarg, 1, 3600000); break;
        case 'r': reset_file = optarg; break;
        case 's': status = optarg; break;
        case 'm': status_ms = number("--status-ms", optarg, 1, 60000); break;
        default: return 2;
        }
    if (!status || optind != argc)
        die("usage: ticker --status FILE [--status-ms MS] [--interval-ms MS] [--long-ms MS]\n"
            "              [--reset-file FILE]");

    begin(&window, "");
    report(&window, status, interval_ms, long_ms);
    wake = reported = clock_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < CLOCKS; i++)
        last[i] = clock_ns(clocks[i]);
    for (;;) {
        int64_t longest = 0;

        wake += interval_ms * NS_PER_MS;
        sleep_until(wake);
        window.ticks++;
        for (int i = 0; i < CLOCKS; i++) {
            int64_t now = clock_ns(clocks[i]), gap = now - last[i];

            last[i] = now;
            if (gap > window.longest[i])
                window.longest[i] = gap;
            if (gap > longest)
                longest = gap;
        }
        if (longest >= (int64_t)long_ms * NS_PER_MS)
            window.long_gaps++;
        if (last[0] - wake > (int64_t)interval_ms * NS_PER_MS)
            wake = last[0]; /* missed ticks are gaps, not ticks to catch up */
        if (last[0] - reported >= (int64_t)status_ms * NS_PER_MS) {
            char token[64];

            if (reset_file && read_text(reset_file, token, sizeof token) > 0 && is_plain(token) &&
                strcmp(token, window.token) != 0)
                begin(&window, token);
            report(&window, status, interval_ms, long_ms);
            reported = last[0];
        }
    }
}
