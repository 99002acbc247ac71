/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What zerocopy.c uses of Xen, for a model of memory: two domains, frames of
 * which only owner, references, M2P entry and one word of contents matter, and
 * p2ms in which a block of 2MiB is one entry or a table.
 */

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __XEN_TOOLS__ 1
#include <xen/xen.h>
#include <xen/domctl.h>
#include <xen/memory.h>

#define NR_BLOCKS 8
#define NR_GFNS   (NR_BLOCKS * 512)
#define NR_FRAMES (2 * NR_GFNS)

#define ERESTART 85

#define likely(x) (x)
#define unlikely(x) (x)
#define ASSERT assert
#define ASSERT_UNREACHABLE() assert(!"unreachable")
#define fallthrough __attribute__((fallthrough))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define read_atomic(p) (*(p))
#define min(a, b) \
    ({ __typeof__(a) a_ = (a); __typeof__(b) b_ = (b); a_ < b_ ? a_ : b_; })
#define min_t(t, a, b) min((t)(a), (t)(b))
#define SWAP(a, b) \
    do { __typeof__(a) t_ = (a); (a) = (b); (b) = t_; } while ( 0 )
#define container_of(p, t, m) ((t *)((char *)(p) - __builtin_offsetof(t, m)))

/* Failures to cause: how many of 1000 allocations fail. */
static unsigned int records_fail, tables_fail;
/*
 * Allocations and accesses to frames since the outermost lock, the session's,
 * has been taken: that's for how long nobody looks for preemption.
 */
static unsigned int work, max_work;
static unsigned int locks;
#define WORK_LIMIT 7000
/* Of these, clearing and copying: ZC_BATCH_TOUCH, and a block at most. */
static unsigned int touched, max_touched;
#define TOUCHED_LIMIT (2048 + 511)

static bool chance(unsigned int of_1000)
{
    return (unsigned int)rand() % 1000 < of_1000;
}

typedef struct { int locked; } spinlock_t;
#define DEFINE_SPINLOCK(l) spinlock_t l

static void spin_lock(spinlock_t *l)
{
    assert(!l->locked);
    l->locked = 1;
    if ( !locks++ )
        work = touched = 0;
}

static void spin_unlock(spinlock_t *l)
{
    assert(l->locked);
    l->locked = 0;
    locks--;
    max_work = work > max_work ? work : max_work;
    max_touched = touched > max_touched ? touched : max_touched;
    assert(work <= WORK_LIMIT && touched <= TOUCHED_LIMIT);
}

static bool hypercall_preempt_check(void)
{
    return chance(300);
}

/* Lists and counts of sessions */
struct list_head { struct list_head *next, *prev; };
#define LIST_HEAD(h) struct list_head h = { &h, &h }
#define list_empty(h) ((h)->next == (h))
#define list_for_each_entry(e, h, m) \
    for ( e = container_of((h)->next, __typeof__(*e), m); &e->m != (h); \
          e = container_of(e->m.next, __typeof__(*e), m) )

static void list_del_init(struct list_head *e)
{
    e->next->prev = e->prev;
    e->prev->next = e->next;
    e->next = e->prev = e;
}

typedef struct { int counter; } atomic_t;

static void atomic_inc(atomic_t *a)
{
    a->counter++;
}

static bool atomic_dec_and_test(atomic_t *a)
{
    return !--a->counter;
}

/* Memory of the hypervisor */
static unsigned int records;

static void *allocate(size_t size)
{
    work++;
    if ( chance(records_fail) )
        return NULL;

    records++;
    return malloc(size);
}

#define xmalloc(t) ((t *)allocate(sizeof(t)))

static void xfree(void *p)
{
    records -= p != NULL;
    free(p);
}

struct radix_tree_root { void *slot[NR_GFNS]; };

static void *radix_tree_lookup(struct radix_tree_root *r, unsigned long key)
{
    return key < NR_GFNS ? r->slot[key] : NULL;
}

static int radix_tree_insert(struct radix_tree_root *r, unsigned long key,
                             void *item)
{
    work++;
    if ( r->slot[key] )
        return -EEXIST;
    if ( chance(records_fail) )
        return -ENOMEM;

    r->slot[key] = item;
    return 0;
}

static void radix_tree_delete(struct radix_tree_root *r, unsigned long key)
{
    assert(r->slot[key]);
    r->slot[key] = NULL;
}

static unsigned int radix_tree_gang_lookup(struct radix_tree_root *r,
                                           void **items, unsigned long key,
                                           unsigned int max)
{
    unsigned int n = 0;

    for ( ; key < NR_GFNS && n < max; key++ )
        if ( r->slot[key] )
            items[n++] = r->slot[key];

    return n;
}

static void radix_tree_destroy(struct radix_tree_root *r, void *f)
{
}

#define DECLARE_BITMAP(name, bits) bool name[bits]
#define bitmap_zero(map, bits) memset(map, 0, bits)
#define __set_bit(i, map) ((map)[i] = true)
#define test_bit(i, map) ((map)[i])

static bool bitmap_empty(const bool *map, unsigned int bits)
{
    return !memchr(map, true, bits);
}

/* Frames */
typedef struct { unsigned long m; } mfn_t;
typedef struct { unsigned long g; } gfn_t;

#define _mfn(x) ((mfn_t){ x })
#define mfn_x(x) ((x).m)
#define mfn_add(x, i) _mfn((x).m + (i))
#define mfn_eq(x, y) ((x).m == (y).m)
#define mfn_valid(x) ((x).m < NR_FRAMES)
#define mfn_to_page(x) (&frames[(x).m])
#define _gfn(x) ((gfn_t){ x })
#define gfn_x(x) ((x).g)
#define gfn_add(x, i) _gfn((x).g + (i))
#define gfn_eq(x, y) ((x).g == (y).g)
#define _pfn(x) (x)
#define INVALID_MFN _mfn(~0UL)
#define INVALID_GFN _gfn(~0UL)
#define INVALID_M2P_ENTRY (~0UL)
#define PGC_allocated (1UL << 60)
#define PAGE_ORDER_4K 0
#define PAGE_ORDER_2M 9

static struct page_info {
    unsigned long count_info;
    struct domain *owner;
    unsigned long gfn;             /* M2P */
    uint64_t contents;
    bool in_use;                   /* Somebody else has a reference. */
} frames[NR_FRAMES];

static bool get_page(struct page_info *pg, struct domain *d)
{
    if ( pg->owner != d )
        return false;

    pg->count_info++;
    return true;
}

static void put_page(struct page_info *pg)
{
    assert(pg->count_info > (PGC_allocated | 1));
    pg->count_info--;
}

static bool is_special_page(const struct page_info *pg)
{
    return false;
}

static void clear_domain_page(mfn_t mfn)
{
    work++;
    touched++;
    frames[mfn_x(mfn)].contents = 0;
}

static void copy_domain_page(mfn_t to, mfn_t from)
{
    work++;
    touched++;
    frames[mfn_x(to)].contents = frames[mfn_x(from)].contents;
}

static void set_gpfn_from_mfn(unsigned long mfn, unsigned long gfn)
{
    frames[mfn].gfn = gfn;
}

static int page_exchange_begin(struct domain *d1, struct page_info *pg1,
                               struct domain *d2, struct page_info *pg2,
                               unsigned int nr)
{
    for ( ; nr--; pg1++, pg2++ )
        if ( pg1->owner != d1 || pg1->count_info != (PGC_allocated | 2) ||
             pg2->owner != d2 || pg2->count_info != (PGC_allocated | 2) )
            return -EBUSY;

    return 0;
}

static void page_exchange_cancel(struct page_info *pg1, struct page_info *pg2,
                                 unsigned int nr)
{
}

static void page_exchange_finish(struct domain *d1, struct page_info *pg1,
                                 struct domain *d2, struct page_info *pg2,
                                 unsigned int nr)
{
    for ( ; nr--; pg1++, pg2++ )
    {
        pg1->owner = d2;
        pg2->owner = d1;
    }
}

/* Domains and their p2ms */
typedef int p2m_access_t;
typedef enum {
    p2m_invalid,
    p2m_ram_rw,
    p2m_ram_logdirty,
    p2m_ram_borrowed,
} p2m_type_t;

#define p2m_is_borrowed(t) ((t) == p2m_ram_borrowed)
#define p2m_get_hostp2m(d) (&(d)->p2m)
#define p2m_locked_by_me(p2m) ((p2m)->locked)
#define hap_has_2mb true
#define paging_mode_log_dirty(d) ((d)->log_dirty)
#define paging_mark_pfn_dirty(d, pfn) ((void)(d), (void)(pfn))
#define domain_crash(d) ((void)(d), assert(!"crashed"))

struct p2m_domain {
    struct domain *domain;
    mfn_t (*get_entry)(struct p2m_domain *p2m, gfn_t gfn, p2m_type_t *t,
                       p2m_access_t *a, int q, unsigned int *order, bool *sve);
    p2m_access_t default_access;
    bool defer_nested_flush;
    bool locked;
    bool stale;                    /* A nested p2m may have what was before. */
    bool superpage[NR_BLOCKS];
    unsigned long mfn[NR_GFNS];
    p2m_type_t type[NR_GFNS];
};

struct domain {
    unsigned int domain_id;
    bool is_dying, is_shutting_down, log_dirty;
    unsigned int tot_pages;
    struct p2m_domain p2m;
};

static unsigned int domain_tot_pages(const struct domain *d)
{
    return d->tot_pages;
}

/* Bits of the ids of domains whose p2ms are locked */
static unsigned int locked_p2ms;

static void p2m_lock(struct p2m_domain *p2m)
{
    /* The one with the lower id comes first. */
    assert(!(locked_p2ms >> p2m->domain->domain_id));
    locked_p2ms |= 1U << p2m->domain->domain_id;
    p2m->locked = true;
}

static void p2m_unlock(struct p2m_domain *p2m)
{
    assert(p2m->locked && !p2m->defer_nested_flush && !p2m->stale);
    locked_p2ms &= ~(1U << p2m->domain->domain_id);
    p2m->locked = false;
}

static mfn_t get_entry(struct p2m_domain *p2m, gfn_t gfn, p2m_type_t *t,
                       p2m_access_t *a, int q, unsigned int *order, bool *sve)
{
    unsigned long g = gfn_x(gfn);

    *a = p2m->default_access;
    *t = g < NR_GFNS ? p2m->type[g] : p2m_invalid;
    if ( order )
        *order = g < NR_GFNS && p2m->superpage[g / 512] ? PAGE_ORDER_2M : 0;

    return g < NR_GFNS ? _mfn(p2m->mfn[g]) : INVALID_MFN;
}

static int p2m_set_entry(struct p2m_domain *p2m, gfn_t gfn, mfn_t mfn,
                         unsigned int order, p2m_type_t t, p2m_access_t a)
{
    unsigned long g = gfn_x(gfn), i;

    assert(p2m->locked && g < NR_GFNS);

    if ( !order && p2m->superpage[g / 512] )
    {
        work++;
        if ( chance(tables_fail) )
            return -ENOMEM;
    }
    p2m->superpage[g / 512] = order;

    for ( i = g; i < g + (1UL << order); i++, mfn = mfn_add(mfn, 1) )
    {
        /* Nested guests have no access to others. */
        bool cached = p2m->type[i] == p2m_ram_rw ||
                      p2m->type[i] == p2m_ram_logdirty;

        if ( cached && p2m->defer_nested_flush &&
             (t != p2m_ram_rw || p2m->mfn[i] != mfn_x(mfn)) )
            p2m->stale = true;

        p2m->mfn[i] = mfn_x(mfn);
        p2m->type[i] = t;
    }

    return 0;
}

static void p2m_flush_nestedp2m(struct domain *d)
{
    d->p2m.stale = false;
}

/* The nested p2ms have had some memory, or none. */
static bool p2m_reclaim_nestedp2m(struct domain *d)
{
    p2m_flush_nestedp2m(d);
    return chance(500);
}

static void p2m_tlb_flush_sync(struct p2m_domain *p2m)
{
}

static int cpu_online_map;

static unsigned int flushes;

static void arch_flush_tlb_mask(const int *mask)
{
    flushes++;
}

static void put_domain(struct domain *d)
{
}

static void send_guest_global_virq(struct domain *d, int virq)
{
}

#define XSM_HOOK 0

static int xsm_zerocopy(int action, struct domain *src, struct domain *dst)
{
    return 0;
}

/* Memory of the caller */
static struct xen_zerocopy_extent *caller_extents;

#define copy_from_guest_offset(to, from, offset, nr) \
    ((void)(from), \
     memcpy(to, caller_extents + (offset), (nr) * sizeof(*(to))), 0)
#define copy_to_guest_offset(to, offset, from, nr) \
    ((void)(to), \
     memcpy(caller_extents + (offset), from, (nr) * sizeof(*(from))), 0)
