#include "reads.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace moe {

static int64_t round_down(int64_t x, int64_t align) { return x & ~(align - 1); }
static int64_t round_up(int64_t x, int64_t align) { return (x + align - 1) & ~(align - 1); }

reads::reads(const std::vector<std::string> & paths, const read_options & options) : paths_(paths), options_(options) {
    for (const auto & path : paths_) {
        int            error = 0;
        const os::file file  = os::open_file(path.c_str(), options_.direct ? os::access::DIRECT : os::access::SCATTERED, &error);
        if (file == os::NO_FILE) {
            for (os::file other : files_) {
                os::close_file(other);
            }
            throw std::runtime_error("cannot open " + path + ": " + os::describe(error));
        }
        files_.push_back(file);
    }
    const os::signals_blocked blocked;  // Ctrl-C belongs to Python's main thread
    for (int i = 0; i < options_.lanes; i++) {
        lanes_.emplace_back([this, i] { lane(i); });
    }
}

reads::~reads() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    work_.notify_all();
    for (auto & t : lanes_) {
        t.join();
    }
    for (os::file file : files_) {
        os::close_file(file);
    }
}

void reads::resize(int n_slots) {
    std::lock_guard<std::mutex> lock(mutex_);
    slots_.resize(n_slots);
}

void reads::submit(int slot, int key, const std::vector<part> & parts, bool guess) {
    std::unique_lock<std::mutex> lock(mutex_);
    slot_info &                  s = slots_[slot];
    if (s.state == slot_state::LOADING) {
        cancel_locked(lock, slot);
    }
    s.key     = key;
    s.guess   = guess;
    s.failed  = false;
    s.dropped = false;
    s.state.store(slot_state::LOADING, std::memory_order_release);
    auto &        queue = guess ? guess_ : demand_;
    const int64_t most  = guess ? GUESS_CHUNK_BYTES : CHUNK_BYTES;
    for (const part & p : parts) {
        // Chunk borders lie on aligned file offsets, so neighbouring direct reads never overlap.
        for (int64_t from = p.offset; from < p.offset + p.bytes;) {
            const int64_t to = std::min(p.offset + p.bytes, round_down(from, options_.offset_align) + most);
            queue.push_back({slot, p.file, from, to - from, p.dest + (from - p.offset)});
            s.queued++;
            from = to;
        }
    }
    if (guess) {
        guessing_.push_back(slot);
        count.guess_loads++;
    }
    lock.unlock();
    work_.notify_all();
}

bool reads::promote(int slot) {
    std::lock_guard<std::mutex> lock(mutex_);
    slot_info &                 s = slots_[slot];
    if (!s.guess) {
        return false;
    }
    s.guess = false;
    if (s.state != slot_state::LOADING || s.dropped) {
        return false;
    }
    count.guess_promoted++;
    for (auto it = guess_.begin(); it != guess_.end();) {
        if (it->slot == slot) {
            demand_.push_back(*it);
            it = guess_.erase(it);
        } else {
            ++it;
        }
    }
    work_.notify_all();
    return true;
}

void reads::drop_guesses(const std::function<bool(int)> & is_wrong, std::vector<int32_t> & keys, size_t limit) {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t                      kept = 0;
    for (size_t i = 0; i < guessing_.size(); i++) {
        const int   slot = guessing_[i];
        slot_info & s    = slots_[slot];
        if (!s.guess || s.state == slot_state::READY || s.state == slot_state::FAILED) {
            continue;  // demanded, or past giving up: the slot table knows it
        }
        if (s.state == slot_state::LOADING && !s.dropped && is_wrong(s.key)) {
            remove_queued(guess_, slot);
            s.dropped = true;
            count.guess_cancelled++;
            if (s.in_flight == 0 && !s.finishing) {
                s.state.store(slot_state::EMPTY, std::memory_order_release);
            }
        }
        if (s.state == slot_state::EMPTY && keys.size() < limit) {
            keys.push_back(s.key);
            s.guess = false;
            s.key   = -1;
            continue;
        }
        guessing_[kept++] = slot;
    }
    guessing_.resize(kept);
}

int reads::cancel_guesses() {
    std::lock_guard<std::mutex> lock(mutex_);
    int                         n = 0;
    for (size_t i = 0; i < slots_.size(); i++) {
        slot_info & s = slots_[i];
        if (s.guess && s.state == slot_state::LOADING && s.in_flight == 0 && !s.finishing) {
            remove_queued(guess_, (int)i);
            s.key   = -1;
            s.guess = false;
            s.state.store(slot_state::EMPTY, std::memory_order_release);
            count.guess_cancelled++;
            n++;
        }
    }
    return n;
}

void reads::remove_queued(std::deque<chunk> & queue, int slot) {
    const auto end = std::remove_if(queue.begin(), queue.end(), [slot](const chunk & c) { return c.slot == slot; });
    slots_[slot].queued -= (int)(queue.end() - end);
    queue.erase(end, queue.end());
}

// Leaves the slot EMPTY with no lane writing to it.
void reads::cancel_locked(std::unique_lock<std::mutex> & lock, int slot) {
    slot_info & s = slots_[slot];
    s.cancelled   = true;
    remove_queued(demand_, slot);
    remove_queued(guess_, slot);
    if (s.guess && !s.dropped) {
        count.guess_cancelled++;
    }
    done_.wait(lock, [&] { return s.in_flight == 0 && !s.finishing; });
    s.cancelled = false;
    s.dropped   = false;
    s.key       = -1;
    s.guess     = false;
    s.state.store(slot_state::EMPTY, std::memory_order_release);
}

void reads::wait_any(const std::vector<int> & wanted) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] {
        for (int slot : wanted) {
            if (slots_[slot].state != slot_state::LOADING) {
                return true;
            }
        }
        return wanted.empty();
    });
}

void reads::step(int n_sequences) {
    std::lock_guard<std::mutex> lock(mutex_);
    n_sequences_ = n_sequences;
}

int64_t reads::ended() {
    std::lock_guard<std::mutex> lock(mutex_);
    return ended_;
}

void reads::wait_beyond(int64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return ended_ > seen; });
}

void reads::abandon(const std::vector<int> & wanted) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int slot : wanted) {
        slot_info & s = slots_[slot];
        if (s.state == slot_state::LOADING) {
            cancel_locked(lock, slot);
        } else if (s.state == slot_state::FAILED) {
            s.key   = -1;
            s.guess = false;
            s.state.store(slot_state::EMPTY, std::memory_order_release);
        }
    }
}

void reads::keys(int32_t * out) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < slots_.size(); i++) {
        slot_info & s = slots_[i];
        out[i]        = coming((int)i) ? s.key.load() : -1;
        if (out[i] < 0) {
            s.guess = false;  // whoever asks has now been told: drop_guesses need not say it again
        }
    }
}

int64_t reads::disk_ns() {
    std::lock_guard<std::mutex> lock(mutex_);
    return disk_ns_ + (active_ > 0 ? now_ns() - active_since_ns_ : 0);
}

std::string reads::last_error() {
    std::lock_guard<std::mutex> lock(mutex_);
    return error_;
}

void reads::inject(int skip, int err) {
    std::lock_guard<std::mutex> lock(mutex_);
    inject_err_ = err;
    inject_skip_.store(skip);
}

// The lock is released while options.finish runs.
void reads::finish_if_done(std::unique_lock<std::mutex> & lock, int slot) {
    slot_info & s = slots_[slot];
    if (s.queued != 0 || s.in_flight != 0 || s.cancelled) {
        return;
    }
    if (s.dropped) {
        s.state.store(slot_state::EMPTY, std::memory_order_release);
        return;
    }
    if (options_.finish && !s.failed) {
        s.finishing   = true;
        const int key = s.key;
        lock.unlock();
        options_.finish(slot, key);
        lock.lock();
        s.finishing = false;
        if (s.cancelled) {
            return;
        }
        if (s.dropped) {
            s.state.store(slot_state::EMPTY, std::memory_order_release);
            return;
        }
    }
    s.state.store(s.failed ? slot_state::FAILED : slot_state::READY, std::memory_order_release);
}

// ---- errands

void reads::send(const std::shared_ptr<errand> & e, bool urgent) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        e->left.store((int)e->ranges.size(), std::memory_order_release);
        for (int i = 0; i < (int)e->ranges.size(); i++) {
            (urgent ? urgent_ : ahead_).emplace_back(e, i);
        }
    }
    for (size_t i = 0; i < std::min(e->ranges.size(), lanes_.size()); i++) {
        work_.notify_one();  // a token's few rows do not need every lane
    }
}

void reads::wait(const std::shared_ptr<errand> & e) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto                   mine = [&e](const auto & r) { return r.first == e; };
    std::copy_if(ahead_.begin(), ahead_.end(), std::back_inserter(urgent_), mine);
    ahead_.erase(std::remove_if(ahead_.begin(), ahead_.end(), mine), ahead_.end());
    done_.wait(lock, [&e] { return e->done(); });
}

// ---- lanes

void reads::lane(int number) {
    char * bounce = nullptr;
    char * memory = nullptr;  // for ranges; most models have none
    if (options_.direct) {
        bounce = (char *)os::aligned_alloc(4096, CHUNK_BYTES + 2 * (size_t)options_.offset_align);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        work_.wait(lock, [this] { return stop_ || !urgent_.empty() || !demand_.empty() || !ahead_.empty() || may_guess(); });
        if (stop_) {
            break;
        }
        if (!urgent_.empty() || (demand_.empty() && !ahead_.empty())) {
            run_range(lock, urgent_.empty() ? ahead_ : urgent_, memory);
        } else {
            run_chunk(lock, number, bounce);
        }
    }
    lock.unlock();
    os::aligned_free(bounce);
    os::aligned_free(memory);
}

// Both release the lock while they read.

void reads::run_chunk(std::unique_lock<std::mutex> & lock, int number, char * bounce) {
    const bool  is_guess = demand_.empty();
    auto &      queue    = is_guess ? guess_ : demand_;
    const chunk c        = queue.front();
    queue.pop_front();
    slot_info & s = slots_[c.slot];
    s.queued--;
    s.in_flight++;
    guessing_lanes_ += is_guess;
    const bool skip  = s.failed;  // the job is lost already: do not spend disk time on its rest
    const bool guess = s.guess;
    const int  kind = guess ? MOE_EVENT_GUESS : MOE_EVENT_DEMAND, key = s.key;
    if (active_++ == 0) {
        active_since_ns_ = now_ns();
    }
    lock.unlock();
    const int64_t     t0    = history.start();
    const std::string error = skip ? std::string() : read_chunk(c, bounce);
    history.add(kind, number, key, t0);
    lock.lock();
    s.in_flight--;
    guessing_lanes_ -= is_guess;
    if (--active_ == 0) {
        disk_ns_ += now_ns() - active_since_ns_;
    }
    if (!error.empty()) {
        s.failed = true;
        error_   = error;
    } else if (guess && !skip) {
        count.guess_bytes += c.bytes;
    }
    finish_if_done(lock, c.slot);
    if (is_guess && may_guess()) {
        work_.notify_one();  // a lane that slept because there were enough at guesses
    }
    if (s.in_flight == 0) {
        ended_++;
        done_.notify_all();
    }
}

void reads::run_range(std::unique_lock<std::mutex> & lock, ranges & queue, char *& memory) {
    const auto [e, i] = queue.front();
    queue.pop_front();
    const bool skip = !e->error.empty();  // lost already
    lock.unlock();
    if (memory == nullptr) {
        memory = (char *)os::aligned_alloc(4096, RANGE_BYTES + 2 * (size_t)options_.offset_align);
    }
    const std::string error = skip ? std::string() : read_range(*e, e->ranges[i], memory);
    lock.lock();
    if (!error.empty()) {
        e->error = error;
    }
    if (e->left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        done_.notify_all();
    }
}

// ---- reading; each answers with a sentence if it cannot

std::string reads::read_chunk(const chunk & c, char * bounce) {
    const int64_t head = c.offset - round_down(c.offset, options_.direct ? options_.offset_align : 1);
    // The slot is padded by offset_align on both sides of a part, so an aligned read may spill
    // over its ends; where the device wants an alignment the slot cannot offer, bounce.
    const bool in_place = !options_.direct || (uintptr_t)(c.dest - head) % options_.memory_align == 0;
    if (!in_place && bounce == nullptr) {
        return "out of memory for a read buffer";
    }
    const std::string error = read_around(c.file, c.offset, c.bytes, in_place ? c.dest - head : bounce);
    if (error.empty() && !in_place) {
        memcpy(c.dest, bounce + head, c.bytes);
        count.bounced++;
    }
    count.bytes += error.empty() ? c.bytes : 0;
    return error;
}

std::string reads::read_range(const errand & e, const errand::range & r, char * memory) {
    if (memory == nullptr) {
        return "out of memory for a read buffer";
    }
    const std::string error = read_around(r.file, r.offset, r.bytes, memory);
    const int64_t     begin = round_down(r.offset, options_.direct ? options_.offset_align : 1);
    for (int i = r.first; i < r.end && error.empty(); i++) {
        memcpy(e.pieces[i].dest, memory + (e.pieces[i].offset - begin), e.pieces[i].bytes);
    }
    count.errand_bytes += error.empty() ? r.bytes : 0;
    return error;
}

// Direct reads start and end at multiples of offset_align, so up to offset_align - 1 bytes before and
// behind those asked for come with them: `dest` takes all of it.
std::string reads::read_around(int file, int64_t offset, int64_t bytes, char * dest) {
    const int     align = options_.direct ? options_.offset_align : 1;
    const int64_t begin = round_down(offset, align);
    const int64_t need  = offset - begin + bytes;
    const int64_t want  = round_up(need, align);
    int64_t       done  = 0;
    bool          cut   = false;

    if (inject_skip_.load(std::memory_order_relaxed) >= 0 && inject_skip_.fetch_sub(1) == 0) {
        const int err = inject_err_;
        if (err > 0) {
            return "cannot read " + paths_[file] + " at " + std::to_string(offset) + ": " + os::describe(err);
        }
        if (err < 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(-err));
        }
        cut = err == 0;
    }
    while (!cut && done < need) {
        const int64_t n = os::read_at(files_[file], dest + done, want - done, begin + done);
        if (n < 0) {
            return "cannot read " + paths_[file] + " at " + std::to_string(offset) + ": " + os::describe((int)-n);
        }
        if (n == 0) {
            cut = true;
            break;
        }
        done += n;
        if (options_.direct && done < need && done % align != 0) {
            cut = true;  // a direct read stops unaligned only at the end of the file
        }
    }
    if (cut) {
        return paths_[file] + " ended early: expected " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
               "; it was truncated or replaced since it was opened";
    }
    count.reads++;
    return {};
}

}  // namespace moe
