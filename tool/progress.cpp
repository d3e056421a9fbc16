#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

#include "text.h"

namespace tool {
namespace {

/// Work does not end because its progress cannot be shown.
void show(const std::string& text) {
    std::fputs(text.c_str(), stderr);
    std::fflush(stderr);
}

}  // namespace

Progress::Progress(std::string label, bool forced)
    : label_(std::move(label)), terminal_(isatty(STDERR_FILENO) != 0), shown_(forced || terminal_) {}

Progress::~Progress() {
    if (drawn_) show("\r\x1b[K");
}

void Progress::update(std::uint64_t done, std::uint64_t total) {
    if (!shown_ || total == 0) return;
    const double share = static_cast<double>(done) / static_cast<double>(total);
    if (!terminal_) {
        const auto tenth = static_cast<std::uint64_t>(share * 10);
        if (tenth > last_tenth_) show(fmt::format("{}: {}%\n", label_, tenth * 10));
        last_tenth_ = std::max(last_tenth_, tenth);
        return;
    }
    const auto now = Clock::now();
    if (now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    drawn_ = true;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double rest = share > 0 ? seconds / share - seconds : 0;
    constexpr int width = 30;
    const int filled = static_cast<int>(share * width);
    show(fmt::format("\r{} [{:#<{}}{:.<{}}] {:3.0f}%  {:.0f} s left\x1b[K", label_, "", filled, "", width - filled,
                     share * 100, rest));
}

}  // namespace tool
