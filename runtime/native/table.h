// Tables on disk: matrices of which only rows are looked up (GET_ROWS), token by token, and which are
// therefore not held in memory. Rows are read on demand or ahead of it, kept in a cache of fixed size,
// and made floats as ggml-cpu makes them.
//
// Owns the cache and the buffer type that marks such a tensor. Knows nothing of layers and experts, nor
// which tensors are tables: it is told.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "buffer_type.h"
#include "failure.h"
#include "reads.h"

namespace moe {

// Which rows of one table are in memory, the least recently used going first.
class row_cache {
  public:
    // Holds at least one row. Throws std::bad_alloc.
    row_cache(const moe_table & table, int64_t bytes);
    ~row_cache();
    row_cache(const row_cache &)             = delete;
    row_cache & operator=(const row_cache &) = delete;

    const moe_table table;

    int    capacity() const { return (int)links_.size() - 1; }
    char * memory(int slot) { return memory_ + slot * table.row_bytes; }
    // The slot that holds a row or awaits it, from now on the last to go; -1 if there is none.
    int find(int64_t row);
    // The slot that goes first.
    int oldest() const { return links_.back().newer; }
    // Gives it to another row, and makes it the last to go. Nothing may be on its way into it.
    void give(int slot, int64_t row, const std::shared_ptr<errand> & bringer);
    // The errand that brings a slot's row; null where it is known to be there.
    const std::shared_ptr<errand> & bringer(int slot) const { return links_[slot].bringer; }
    void                            arrived(int slot) { links_[slot].bringer = nullptr; }
    // The rows of an errand that failed are not there.
    void forget(const std::shared_ptr<errand> & failed);

  private:
    // In a ring: links_.back(), the newest slot, ..., the oldest slot.
    struct link {
        int64_t                 row = -1;
        int                     newer, older;
        std::shared_ptr<errand> bringer;
    };

    void insert_newest(int slot);
    void remove(int slot);

    char *                           memory_ = nullptr;
    std::vector<link>                links_;  // one more than there are slots
    std::unordered_map<int64_t, int> slot_of_;
};

class tables {
  public:
    tables(int api_version, ggml_backend_dev_t device, moe::reads & reads, failure & why);

    buffer_type type;

    // Those of the model that a lookup is of.
    static tables & of(const ggml_tensor * lookup);
    // Which tensors are tables, and the memory for rows of all of them; once. False when it is refused.
    bool hold(const moe_table * tables, int n, int64_t cache_bytes);
    // Starts reading rows that will be asked for soon, as far as half of the cache holds them.
    void fetch(int table, const int32_t * rows, int n);
    // Computes a node that is_lookup; false after a failure.
    bool compute(ggml_tensor * node);

    struct counters {
        int64_t asked;     // for
        int64_t missed;    // of them neither in the cache nor on their way
        int64_t ahead;     // fetched before anyone did
        int64_t stall_ns;  // waiting for rows
    };
    counters counted();

  private:
    row_cache * cache_of(const ggml_tensor * node);
    bool        read_rows(const ggml_tensor * node, const moe_table & table);
    bool        load(row_cache & cache, const int64_t * rows, int n);
    void        wait(const std::shared_ptr<errand> & e);
    void        send(row_cache & cache, const std::shared_ptr<errand> & e, std::vector<std::pair<int64_t, int>> & rows, bool urgent);

    moe::reads &                            reads_;
    failure &                               why_;
    std::mutex                              mutex_;  // of the cache: contexts take turns
    std::vector<std::unique_ptr<row_cache>> caches_;
    counters                                count_{};
    std::vector<int64_t>                    rows_;     // of the running node
    std::vector<int>                        slots_;    // of those that are loaded at once
    std::vector<std::pair<int64_t, int>>    missing_;  // row and slot
};

// Whether a tensor is a table on disk or a view of one, by its buffer's type; whether a node looks rows
// up in one.
bool is_table_type(ggml_backend_buffer_type_t buft);
bool is_table(const ggml_tensor * t);
bool is_lookup(const ggml_tensor * node);

}  // namespace moe
