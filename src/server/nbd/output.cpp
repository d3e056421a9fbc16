#include "server/nbd/output.h"

namespace qcow::nbd {
namespace {

constexpr std::size_t max_collected = std::size_t{256} << 10;
/// From here on a copy costs more than a system call.
constexpr std::size_t max_small = std::size_t{16} << 10;

}  // namespace

void Output::send(std::span<const std::byte> bytes) {
    std::unique_lock lock(mutex_);
    if (busy_ && bytes.size() <= max_small && collected_.size() + bytes.size() <= max_collected) {
        collected_.insert(collected_.end(), bytes.begin(), bytes.end());
        return;
    }
    turn_over_.wait(lock, [&] { return !busy_; });
    busy_ = true;
    lock.unlock();
    write(bytes);
    lock.lock();
    finish_turn(lock);
}

void Output::finish_turn(std::unique_lock<std::mutex>& lock) {
    while (!collected_.empty()) {
        sending_.swap(collected_);
        lock.unlock();
        write(sending_);
        sending_.clear();
        lock.lock();
    }
    busy_ = false;
    turn_over_.notify_one();
}

void Output::write(std::span<const std::byte> bytes) {
    if (!broken_ && !stream_.send(bytes)) hang_up();
}

void Output::hang_up() {
    broken_ = true;
    stream_.shutdown();
}

Output::Turn::Turn(Output& output) : output_(output) {
    std::unique_lock lock(output.mutex_);
    output.turn_over_.wait(lock, [&] { return !output.busy_; });
    output.busy_ = true;
}

Output::Turn::~Turn() {
    std::unique_lock lock(output_.mutex_);
    output_.finish_turn(lock);
}

}  // namespace qcow::nbd
