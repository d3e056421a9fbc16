#pragma once
// A front end that is connected: its messages, and the queues that they set up.

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "server/vhost_user/messages.h"
#include "server/vhost_user/queue.h"

namespace qcow::vhost_user {

/// Does what the messages of one front end ask for.
///
/// No queue runs while a message changes what the queue uses: the queue ends before, and begins again after it. So
/// neither rings nor memory nor features need a lock.
///
/// Thread safety: one thread at a time.
class Session {
public:
    /// `device` and `options` must outlive the session.
    Session(int socket, Device& device, const VhostUserOptions& options);
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    /// Completes the requests that were taken.
    ~Session();

    /// Receives a message and does what it asks for. Returns false if the front end has left. Errors: why the front end
    /// must be disconnected.
    Result<bool> serve_message();

    /// Whether a queue runs.
    [[nodiscard]] bool has_queues() const {
        return std::ranges::any_of(queues_, [](const auto& queue) { return queue != nullptr; });
    }

    /// Tells the front end that the configuration space has changed, if it wants to know.
    void announce_configuration();

private:
    struct Handler;
    static const Handler* handler_of(std::uint32_t request);

    [[nodiscard]] Result<void> dispatch(Message& message, const Handler* handler);
    [[nodiscard]] Result<void> start_queues();
    void stop_queues();

    template <class Payload>
    static Payload as(const Message& message);
    template <class Payload>
    Result<void> reply(const Message& message, const Payload& payload, int descriptor = -1) const;
    Result<void> reply_bytes(const Message& message, std::span<const std::byte> payload, int descriptor = -1) const;
    Result<QueueState*> halted(std::uint64_t queue);
    Result<QueueState*> set_descriptor(Message& message, FileDescriptor QueueState::* which);
    Result<void> map_inflight(const InflightPlace& place, int fd);
    void reset();

    // What messages ask for, by their names in the protocol.
    Result<void> get_features(Message& message);
    Result<void> set_features(Message& message);
    Result<void> reset_owner(Message& message);
    Result<void> set_mem_table(Message& message);
    Result<void> set_log_base(Message& message);
    Result<void> set_vring_num(Message& message);
    Result<void> set_vring_addr(Message& message);
    Result<void> set_vring_base(Message& message);
    Result<void> get_vring_base(Message& message);
    Result<void> set_vring_kick(Message& message);
    Result<void> set_vring_call(Message& message);
    Result<void> set_vring_err(Message& message);
    Result<void> get_protocol_features(Message& message);
    Result<void> set_protocol_features(Message& message);
    Result<void> get_queue_num(Message& message);
    Result<void> set_vring_enable(Message& message);
    Result<void> set_backend_req_fd(Message& message);
    Result<void> get_config(Message& message);
    Result<void> set_config(Message& message);
    Result<void> get_inflight_fd(Message& message);
    Result<void> set_inflight_fd(Message& message);
    void record_cache_mode();
    Result<void> get_max_mem_slots(Message& message);
    Result<void> add_mem_reg(Message& message);
    Result<void> rem_mem_reg(Message& message);
    Result<void> set_status(Message& message);
    Result<void> get_status(Message& message);
    Result<void> nothing(Message& message);

    int socket_;
    Device& device_;
    const VhostUserOptions& options_;
    GuestMemory memory_;
    std::shared_ptr<SharedMemory> inflight_;
    std::span<std::byte> cache_mode_record_;  // in it
    FileDescriptor back_channel_{-1};
    std::uint64_t features_ = 0;
    std::uint64_t protocol_features_ = 0;
    std::uint64_t status_ = 0;
    std::vector<QueueState> states_;
    std::vector<std::unique_ptr<Queue>> queues_;  // nullptr: it does not run
};

}  // namespace qcow::vhost_user
