#include "server/vhost_user/queue.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/epoll.h>

#include <cerrno>
#include <chrono>
#include <system_error>
#include <utility>

#include "base/bits.h"
#include "base/within_memory.h"

namespace qcow::vhost_user {
namespace {

/// Completed requests between two looks at whether the driver wants an interrupt. An interrupt costs a system call, and
/// the driver is busy with the first ones while the next are executed.
constexpr std::uint32_t announced_at_once = 16;

/// How often the ring is looked at where the driver does not kick.
constexpr int look_milliseconds = 1;

/// Buffers are the guest's memory, so their size bounds nothing; the size of the ring bounds their number.
constexpr std::uint64_t no_bound = std::uint64_t{1} << 60;

using Clock = std::chrono::steady_clock;

/// Adds to the counter of an event descriptor; -1 is none.
void ring_event(int fd) {
    // A descriptor of a front end can be full, and a thread that waits for it would never end.
    pollfd writable = {fd, POLLOUT, 0};
    if (fd < 0 || ((fcntl(fd, F_GETFL) & O_NONBLOCK) == 0 && poll(&writable, 1, 0) != 1)) return;
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(fd, &one, sizeof one);
}

}  // namespace

Queue::Queue(const Device& device, const GuestMemory& memory, QueueState& state, const VhostUserOptions& options,
             const SplitRing& ring)
    : device_(device),
      memory_(memory),
      state_(state),
      options_(options),
      ring_(ring),
      polling_(std::chrono::microseconds(options.poll_microseconds)),
      crew_(options.workers, no_bound) {}

Result<std::unique_ptr<Queue>> Queue::start(const Device& device, const GuestMemory& memory, QueueState& state,
                                            const VhostUserOptions& options) {
    const auto ring = TRY(SplitRing::find(memory, state.ring));
    std::unique_ptr<Queue> queue(new Queue(device, memory, state, options, ring));
    TRY_VOID(queue->prepare());
    return queue;
}

Result<void> Queue::prepare() {
    if (!state_.inflight.empty()) inflight_.emplace(state_.inflight, state_.ring.size);
    events_.reset(epoll_create1(EPOLL_CLOEXEC));
    if (events_.get() < 0 || wakeup_.fd() < 0) return system_error("cannot be made", "queue", errno);
    // Each kick is an event, so that nobody has to read the descriptor.
    for (const int fd : {wakeup_.fd(), state_.kick.get()}) {
        epoll_event event = {};
        event.events = EPOLLIN | EPOLLET;
        event.data.fd = fd;
        if (fd >= 0 && epoll_ctl(events_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
            return system_error("cannot wait for kicks", "queue", errno);
    }
    try {
        thread_ = std::thread([this] { run(); });
    } catch (const std::system_error& error) {
        return system_error("cannot start a thread", "queue", error.code().value());
    }
    return {};
}

Queue::~Queue() {
    stopping_ = true;
    wakeup_.ring();
    if (thread_.joinable()) thread_.join();
    crew_.finish();
    state_.ring.next_available = ring_.next_available();
}

Pace& Queue::pace_of(const BlockRequest& request) { return paces_[static_cast<std::size_t>(Device::kind_of(request))]; }

void Queue::run() {
    const auto done = within_memory([&]() -> Result<void> {
        recover();
        while (!stopping_) {
            TRY_VOID(take_requests());
            wait_for_requests();
        }
        return {};
    });
    if (done) return;
    if (options_.complain) options_.complain(fmt::format("a queue has stopped: {}", done.error().message()));
    ring_event(state_.error.get());
}

/// Executes what another server has left.
void Queue::recover() {
    if (!inflight_) return;
    const auto heads = inflight_->recover(ring_.completed());
    ring_.go_on_from(static_cast<std::uint16_t>(ring_.completed() + heads.size()));
    for (const auto head : heads) {
        ++in_flight_;
        execute(head);
    }
    announce();
}

Result<void> Queue::take_requests() {
    while (!stopping_) {
        const auto head = TRY(ring_.next());
        if (!head) break;
        if (in_flight_ >= state_.ring.size) return fail(Errc::corrupt, "ring", "a request was added twice");
        ++in_flight_;
        if (inflight_) {
            const std::lock_guard lock(mutex_);
            inflight_->begin(*head);
        }
        execute(*head);
        if (unannounced_ >= announced_at_once) announce();
    }
    announce();
    return {};
}

bool Queue::for_the_crew(const Chain& chain, const Pace& pace) {
    if (!crew_.exists()) return false;
    // Of large requests two are executed at once, even if the disk is quick: one here, one there.
    const bool large = chain.bytes >= 128 * KiB && !ring_.is_empty() && crew_.is_idle();
    return large || pace.is_slow();
}

/// Executes the request of `chain`, and completes it.
void Queue::perform(std::uint16_t head, const Chain& chain) {
    const auto request = Device::parse(chain);
    const auto written = pace_of(request).timed(chain.bytes, [&] { return device_.perform(request, memory_); });
    complete(head, written);
}

void Queue::execute(std::uint16_t head) {
    if (!ring_.load(head, chain_)) {
        complete(head, 0);
    } else if (for_the_crew(chain_, pace_of(Device::parse(chain_)))) {
        announce();
        return hand_over(head);
    } else {
        perform(head, chain_);
    }
    ++unannounced_;
}

/// Has the crew execute the request of `chain_`.
void Queue::hand_over(std::uint16_t head) {
    auto chain = take_chain();
    std::swap(*chain, chain_);
    crew_.reserve(0);
    crew_.submit(0, [this, head, chain = std::move(chain)]() mutable {
        perform(head, *chain);
        give_back(std::move(chain));
        interrupt();
    });
}

std::unique_ptr<Chain> Queue::take_chain() {
    const std::lock_guard lock(mutex_);
    if (chains_.empty()) {
        chains_.reserve(state_.ring.size);  // so that giving one back takes no memory
        return std::make_unique<Chain>();
    }
    auto chain = std::move(chains_.back());
    chains_.pop_back();
    return chain;
}

void Queue::give_back(std::unique_ptr<Chain> chain) {
    const std::lock_guard lock(mutex_);
    chains_.push_back(std::move(chain));
}

void Queue::complete(std::uint16_t head, std::uint32_t written) {
    const std::lock_guard lock(mutex_);
    if (inflight_) inflight_->will_complete(head);
    ring_.complete(head, written);
    if (inflight_) inflight_->has_completed(head, ring_.completed());
    --in_flight_;
}

/// Interrupts the driver for the requests that this thread has completed, if it wants that.
void Queue::announce() {
    if (std::exchange(unannounced_, 0) > 0) interrupt();
}

void Queue::interrupt() {
    {
        const std::lock_guard lock(mutex_);
        if (!ring_.wants_interrupt()) return;
    }
    ring_event(state_.call.get());
}

void Queue::wait_for_requests() {
    const auto begin = Clock::now();
    if (!look_for_more()) {
        ring_.ask_for_kicks(true);
        if (ring_.is_empty()) wait_for_kick();
        ring_.ask_for_kicks(false);
    }
    polling_.came_after(Clock::now() - begin);
}

/// Looks at an empty ring for a while, if that pays. Returns whether there is a request.
bool Queue::look_for_more() {
    if (!polling_.pays()) return false;
    const auto end = Clock::now() + polling_.limit();
    while (!stopping_ && Clock::now() < end)
        if (!ring_.is_empty()) return true;
    return false;
}

void Queue::wait_for_kick() {
    epoll_event event = {};
    const int kick = state_.kick.get();
    const bool kicked = epoll_wait(events_.get(), &event, 1, kick < 0 ? look_milliseconds : -1) > 0;
    if (!kicked || event.data.fd != kick || !ring_.is_empty() || ring_.completed() != 0) return;
    // Front ends kick once when a queue starts.
    if (++idle_kicks_ == 2 && options_.complain)
        options_.complain(
            "a queue is notified and has never had a request: does the guest share its memory (share=on)?");
}

}  // namespace qcow::vhost_user
