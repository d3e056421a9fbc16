#pragma once
// Allocations of memory that fail. The program's operator new asks `shortage` (see shortage.cpp).

#include <cstdint>
#include <utility>

namespace qcow::test {

/// Which allocations fail: those made while the engine works, from number `after` on, `times` of them.
struct Shortage {
    bool engine_works = false;
    std::uint64_t after = ~std::uint64_t{0};
    std::uint64_t times = 1;
    std::uint64_t count = 0;
    std::uint64_t hits = 0;

    /// Whether the next one does.
    bool strikes() {
        if (!engine_works) return false;
        const auto n = count++;
        if (n < after || n - after >= times) return false;
        ++hits;
        return true;
    }
};

extern thread_local Shortage shortage;

/// The engine is at work, or something else is again, as long as this lives.
class Works {
public:
    explicit Works(bool engine) : before_(std::exchange(shortage.engine_works, engine)) {}
    Works(const Works&) = delete;
    Works& operator=(const Works&) = delete;
    ~Works() { shortage.engine_works = before_; }

private:
    bool before_;
};

}  // namespace qcow::test
