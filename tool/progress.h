#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace tool {

/// Shows progress on standard error: a bar on a terminal; elsewhere, if forced, a line per tenth, else nothing.
class Progress {
public:
    Progress(std::string label, bool forced);
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;
    /// Erases the bar.
    ~Progress();

    void update(std::uint64_t done, std::uint64_t total);

private:
    using Clock = std::chrono::steady_clock;
    std::string label_;
    bool terminal_;
    bool shown_;
    bool drawn_ = false;
    std::uint64_t last_tenth_ = 0;
    Clock::time_point start_ = Clock::now();
    Clock::time_point last_ = start_;
};

}  // namespace tool
