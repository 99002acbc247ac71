/* What the guest programs share: clocks, option values, and publishing a
 * small JSON document that a reader never sees half written. */
#ifndef VMBEAM_GUEST_H
#define VMBEAM_GUEST_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define NS_PER_MS INT64_C(1000000)
#define NS_PER_S INT64_C(1000000000)

int memcheck_main(int argc, char **argv);
int diskseq_main(int argc, char **argv);
int behind_main(int argc, char **argv);
int ticker_main(int argc, char **argv);
int statusd_main(int argc, char **argv);

/* Nanoseconds of a clock. */
int64_t clock_ns(clockid_t clock);

/* Sleeps until CLOCK_MONOTONIC reaches deadline (nanoseconds). */
void sleep_until(int64_t deadline);

/* Seconds since boot, suspended time included. */
double uptime(void);

/* Writes an error message and exits with status 2. */
void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

/* The number in text, or exits with a message that names the option. */
uint64_t number(const char *option, const char *text, uint64_t low, uint64_t high);

/* Replaces path by the formatted text: write to a temporary name, then
 * rename. A failure is reported once on stderr and otherwise ignored,
 * because the work being measured matters more than its report. */
void publish(const char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Reads at most size - 1 bytes and terminates them, trailing white space
 * removed. Returns the length, or -1 when the file cannot be read. */
int read_text(const char *path, char *buffer, size_t size);

/* A checksum of words that is cheap on an emulated CPU: two running sums, of
 * which any changed word or swap of words changes the second. seed makes
 * equal words in two places differ, and zeros never sum up to zero. */
uint64_t checksum_words(uint64_t seed, const uint64_t *words, size_t count);

/* True when text is short enough and made of letters, digits, '.', '-', '_'
 * only, so that it can be a file name or stand in JSON unquoted. */
int is_plain(const char *text);

#endif
