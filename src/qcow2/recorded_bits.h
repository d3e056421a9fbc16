#pragma once
// The bits of a bitmap that were set in memory.

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/bits.h"

namespace qcow::qcow2 {

/// Bit n is bit n % 64 of word n / 64. Words can be read and changed by any number of threads, also while more are
/// added behind them: they never move.
class RecordedBits {
public:
    [[nodiscard]] std::uint64_t words() const { return words_; }
    [[nodiscard]] std::uint64_t capacity() const { return capacity_; }  // words that there is memory for

    std::atomic<std::uint64_t>& operator[](std::uint64_t word) const {
        Part* part = last_.load(std::memory_order_acquire);
        while (word < part->first) part = part->before.get();
        return part->words[word - part->first];
    }

    [[nodiscard]] bool test(std::uint64_t n) const {
        return ((*this)[n / 64].load(std::memory_order_acquire) & bit(n % 64)) != 0;
    }
    void set(std::uint64_t n) const { (*this)[n / 64].fetch_or(bit(n % 64), std::memory_order_release); }

    // By one thread at a time:

    /// Takes memory for so many words.
    void reserve(std::uint64_t words) {
        if (words <= capacity_) return;
        parts_ = std::make_unique<Part>(capacity_, words - capacity_, std::move(parts_));
        last_.store(parts_.get(), std::memory_order_release);
        capacity_ = words;
    }

    /// To so many bits; new ones are 0. Nobody may be using those that are cut off.
    void resize(std::uint64_t bits) {
        const std::uint64_t words = divide_up(bits, 64);
        reserve(words);
        for (std::uint64_t word = words; word < words_; ++word) (*this)[word] = 0;
        if (bits % 64 != 0) (*this)[words - 1] &= low_bits(bits % 64);
        words_ = words;
    }

private:
    struct Part {
        Part(std::uint64_t begin, std::uint64_t count, std::unique_ptr<Part> behind)
            : first(begin), words(count), before(std::move(behind)) {}
        std::uint64_t first;
        std::vector<std::atomic<std::uint64_t>> words;
        std::unique_ptr<Part> before;
    };

    std::uint64_t words_ = 0;
    std::uint64_t capacity_ = 0;
    std::unique_ptr<Part> parts_;
    std::atomic<Part*> last_ = nullptr;
};

}  // namespace qcow::qcow2
