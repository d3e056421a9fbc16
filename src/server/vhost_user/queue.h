#pragma once
// A request queue: the thread that takes requests from a ring, and those that execute the slow ones.

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "server/crew.h"
#include "server/pace.h"
#include "server/polling.h"
#include "server/vhost_user/device.h"
#include "server/vhost_user/inflight.h"
#include "server/vhost_user/split_ring.h"
#include "server/wakeup.h"

namespace qcow::vhost_user {

/// A queue, as messages describe it.
struct QueueState {
    SplitRing::Setup ring = {};
    FileDescriptor kick{-1};   // the driver has added requests
    FileDescriptor call{-1};   // interrupts the driver
    FileDescriptor error{-1};  // the queue does not go on
    bool addressed = false;    // whether ring.addresses are known
    bool started = false;      // whether there has been a kick descriptor, or word that there is none
    bool enabled = false;
    std::span<std::byte> inflight;  // empty: there is no record

    [[nodiscard]] bool is_ready() const { return addressed && started && enabled && ring.size > 0; }
};

/// Takes requests while it lives.
///
/// Thread safety: one thread makes and ends it.
class Queue {
public:
    /// Starts the thread. `state` must outlive the queue, and the memory, too. Errors: those of SplitRing::find and of
    /// the system.
    static Result<std::unique_ptr<Queue>> start(const Device& device, const GuestMemory& memory, QueueState& state,
                                                const VhostUserOptions& options);

    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;
    /// Completes the requests that were taken, and notes in the state where the next queue goes on.
    ~Queue();

private:
    Queue(const Device& device, const GuestMemory& memory, QueueState& state, const VhostUserOptions& options,
          const SplitRing& ring);

    Result<void> prepare();
    void run();
    void recover();
    [[nodiscard]] Result<void> take_requests();
    void execute(std::uint16_t head);
    void perform(std::uint16_t head, const Chain& chain);
    void hand_over(std::uint16_t head);
    void complete(std::uint16_t head, std::uint32_t written);
    void announce();
    void interrupt();
    [[nodiscard]] Pace& pace_of(const BlockRequest& request);
    [[nodiscard]] bool for_the_crew(const Chain& chain, const Pace& pace);
    void wait_for_requests();
    [[nodiscard]] bool look_for_more();
    void wait_for_kick();
    [[nodiscard]] std::unique_ptr<Chain> take_chain();
    void give_back(std::unique_ptr<Chain> chain);

    const Device& device_;
    const GuestMemory& memory_;
    QueueState& state_;
    const VhostUserOptions& options_;
    SplitRing ring_;
    std::optional<InflightRecord> inflight_;
    std::array<Pace, kinds_of_work> paces_;
    Polling polling_;
    Chain chain_;                    // of the request that the thread executes itself
    unsigned idle_kicks_ = 0;        // of a ring that never had a request
    std::uint32_t unannounced_ = 0;  // requests that this thread has executed since it last interrupted the driver
    std::atomic<std::uint32_t> in_flight_ = 0;

    std::mutex mutex_;                            // of completing requests, the record and the following
    std::vector<std::unique_ptr<Chain>> chains_;  // that no task uses

    std::atomic<bool> stopping_ = false;
    Wakeup wakeup_;
    FileDescriptor events_{-1};
    Crew crew_;
    std::thread thread_;
};

}  // namespace qcow::vhost_user
