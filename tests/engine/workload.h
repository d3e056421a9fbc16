#pragma once
// Random work of whole sectors, by one or more threads, with a model of what the disk may hold.

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support/guest.h"
#include "support/random.h"

namespace qcow::test {

/// What is done how often, relative to each other.
struct Mix {
    unsigned write = 10;
    unsigned write_compressed = 0;
    unsigned zero = 0;
    unsigned discard = 0;
    unsigned flush = 1;
    unsigned resize = 0;  ///< of one thread only
    unsigned read = 0;

    std::uint64_t longest = 64;      ///< sectors a request
    std::uint64_t window = 0;        ///< sectors from the front that are used; 0: all
    bool sequential = false;         ///< each write follows the one before
    std::uint64_t resized_most = 0;  ///< sectors
    bool shrink = true;
};

/// One thread's share. What fails is for the caller, or an exception.
class Worker {
public:
    Worker(Guest& guest, const Mix& mix, Random random) : guest_(guest), mix_(mix), random_(std::move(random)) {}

    Result<void> step() {
        auto dice = random_.below(mix_.write + mix_.write_compressed + mix_.zero + mix_.discard + mix_.flush +
                                  mix_.resize + mix_.read);
        const auto is = [&](unsigned share) {
            if (dice < share) return true;
            dice -= share;
            return false;
        };
        const auto size = guest_.sectors();
        const auto window = mix_.window == 0 ? size : std::min(mix_.window, size);
        auto first = random_.below(window);
        auto count = random_.between(1, std::min(mix_.longest, window - first));
        const auto block = std::max<std::uint64_t>(1, guest_.image().block_size() / sector_bytes);
        if (is(mix_.flush)) return guest_.flush();
        if (is(mix_.zero)) {
            return guest_.write_zeroes(first, count, random_.pick({Disk::Zeroes::keep, Disk::Zeroes::release}));
        }
        if (is(mix_.discard)) {
            if (random_.chance(70)) {
                first = first / block * block;
                count = std::min(random_.between(1, 4) * block, size - first);
            }
            return guest_.discard(first, count);
        }
        if (is(mix_.write_compressed)) {
            first = first / block * block;
            return guest_.write_compressed(first, std::min(random_.between(1, 3) * block, size - first));
        }
        if (is(mix_.resize)) {
            const auto target = mix_.shrink ? random_.between(1, mix_.resized_most)
                                            : random_.between(size, std::max(size, mix_.resized_most));
            return guest_.resize(target, Image::Shrink::allow);
        }
        if (is(mix_.read)) {
            const auto wrong = guest_.inspect(first, count);
            if (!wrong) return std::unexpected(wrong.error());
            if (*wrong) throw std::runtime_error(**wrong);
            return {};
        }
        if (mix_.sequential) {
            first = next_ < window ? next_ : 0;
            count = std::min(count, window - first);
            next_ = first + count;
        }
        return guest_.write(first, count);
    }

private:
    Guest& guest_;
    Mix mix_;
    Random random_;
    std::uint64_t next_ = 0;
};

/// Runs `work(thread number)` in that many threads, a single one on the caller's. The first exception is passed on when
/// all are done.
template <class Work>
void in_threads(unsigned threads, const Work& work) {
    if (threads == 1) return work(0);
    std::mutex mutex;
    std::string failure;
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) {
        running.emplace_back([&, t] {
            try {
                work(t);
            } catch (const std::exception& e) {
                const std::lock_guard lock(mutex);
                if (failure.empty()) failure = e.what();
            }
        });
    }
    for (auto& thread : running) thread.join();
    if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace qcow::test
