#pragma once
// What goes to a client, from the threads that work for it.

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "server/stream.h"

namespace qcow::nbd {

/// The sending side of a connection, shared by its threads. While one of them sends, what the others have is collected
/// and goes out behind it at once, so that many small replies cost few system calls; when much has been collected, or
/// a reply is large, its thread waits for its turn. When the peer is gone, everything is dropped.
class Output {
public:
    explicit Output(Stream& stream) : stream_(stream) {}

    /// Sends one or more whole messages.
    void send(std::span<const std::byte> bytes);

    /// For a message in several pieces: nobody else sends until the turn is over.
    class Turn {
    public:
        explicit Turn(Output& output);
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;
        ~Turn();
        void send(std::span<const std::byte> bytes) { output_.write(bytes); }

    private:
        Output& output_;
    };

    /// The peer is gone, or has been hung up on.
    [[nodiscard]] bool broken() const { return broken_; }

    /// Ends the connection in both directions.
    void hang_up();

private:
    void write(std::span<const std::byte> bytes);
    void finish_turn(std::unique_lock<std::mutex>& lock);

    Stream& stream_;
    std::atomic<bool> broken_ = false;
    std::mutex mutex_;
    std::condition_variable turn_over_;
    bool busy_ = false;
    std::vector<std::byte> collected_;
    std::vector<std::byte> sending_;  // belongs to the sender
};

}  // namespace qcow::nbd
