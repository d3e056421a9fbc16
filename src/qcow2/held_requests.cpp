#include "qcow2/held_requests.h"

#include <fmt/format.h>

#include <chrono>
#include <thread>

#include "base/try.h"

namespace qcow::qcow2 {
namespace {

// Requests are held no longer than that where one of them takes its time; then they go on, and closing is tried again.
constexpr std::chrono::milliseconds max_hold{20};
constexpr std::chrono::seconds max_wait{60};

}  // namespace

Result<HeldRequests> HeldRequests::hold(RequestGate& gate, const std::string& file) {
    const auto deadline = std::chrono::steady_clock::now() + max_wait;
    do {
        if (gate.close(max_hold)) return HeldRequests(gate);
        std::this_thread::sleep_for(max_hold);
    } while (std::chrono::steady_clock::now() < deadline);
    return fail(
        Errc::io, file,
        fmt::format("a request did not end for {} seconds; try again when the disk is less busy", max_wait.count()));
}

}  // namespace qcow::qcow2
