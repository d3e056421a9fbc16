// The server: accepts front ends, one after the other.

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <mutex>
#include <thread>

#include "base/within_memory.h"
#include "qcow/vhost_user.h"
#include "server/socket.h"
#include "server/vhost_user/session.h"
#include "server/wakeup.h"

namespace qcow {
namespace {

using vhost_user::Device;
using vhost_user::Session;
using vhost_user::SplitRing;

constexpr unsigned max_queues = 256;

/// Queues that are offered if nobody says how many.
constexpr unsigned usual_queues = 16;

/// How long a front end may take for the rest of a message that it has begun, or for one that is sent to it.
constexpr timeval patience = {5, 0};

/// Passes on ten complaints at once and one a second, so that a front end cannot flood whoever writes them down.
class LimitedComplaints {
public:
    explicit LimitedComplaints(std::function<void(const std::string&)> complain) : complain_(std::move(complain)) {}

    void operator()(const std::string& text) {
        const std::lock_guard lock(mutex_);
        const auto now = Clock::now();
        allowance_ = std::min(most, allowance_ + std::chrono::duration<double>(now - last_).count());
        last_ = now;
        if (allowance_ < 1) return;
        allowance_ -= 1;
        complain_(text);
    }

private:
    using Clock = std::chrono::steady_clock;
    static constexpr double most = 10;

    std::function<void(const std::string&)> complain_;
    std::mutex mutex_;
    Clock::time_point last_ = Clock::now();
    double allowance_ = most;
};

class Server final : public VhostUserServer {
public:
    Server(std::shared_ptr<Disk> disk, VhostUserOptions options)
        : disk_(std::move(disk)),
          options_(std::move(options)),
          device_(disk_, options_),
          announced_size_(disk_->size()) {}

    [[nodiscard]] bool usable() const { return wakeup_.fd() >= 0; }

    Result<void> listen_unix(const std::string& path) override {
        return within_memory([&]() -> Result<void> {
            listeners_.push_back(TRY(qcow::listen_unix(path)));
            return {};
        });
    }

    Result<void> listen_inherited(int fd) override {
        return within_memory([&]() -> Result<void> {
            listeners_.push_back(TRY(qcow::listen_inherited(fd)));
            return {};
        });
    }

    Result<void> run() override {
        auto result = within_memory([&] { return serve(); });
        listeners_.clear();
        if (!options_.read_only) {
            auto flushed = disk_->flush();
            if (result) result = std::move(flushed);
        }
        return result;
    }

    void stop() noexcept override {
        stopping_ = true;
        wakeup_.ring();
    }

    [[nodiscard]] bool has_served() const noexcept override { return has_served_; }

    void announce_size() noexcept override { wakeup_.ring(); }

private:
    Result<void> serve();
    Result<FileDescriptor> accept_front_end();
    Result<void> serve_front_end(int socket);

    std::shared_ptr<Disk> disk_;
    VhostUserOptions options_;
    Device device_;
    std::uint64_t announced_size_;
    Wakeup wakeup_;
    std::atomic<bool> stopping_ = false;
    std::atomic<bool> has_served_ = false;
    std::vector<Listener> listeners_;
};

Result<void> Server::serve() {
    while (!stopping_) {
        const auto socket = TRY(accept_front_end());
        if (socket.get() < 0) continue;
        auto served = within_memory([&] { return serve_front_end(socket.get()); });
        if (!served && options_.complain)
            options_.complain(fmt::format("a front end was disconnected: {}", served.error().message()));
        if (!options_.persistent) return {};
    }
    return {};
}

/// Waits for a front end. -1: there is none yet.
Result<FileDescriptor> Server::accept_front_end() {
    std::vector<pollfd> polled = {{wakeup_.fd(), POLLIN, 0}};
    for (const auto& listener : listeners_) polled.push_back({listener.fd(), POLLIN, 0});
    if (poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR)
        return system_error("cannot wait for front ends", "server", errno);
    wakeup_.quiet();
    for (std::size_t i = 1; i < polled.size() && !stopping_; ++i) {
        if (polled[i].revents == 0) continue;
        FileDescriptor socket(accept4(polled[i].fd, nullptr, nullptr, SOCK_CLOEXEC));
        if (socket.get() >= 0) return socket;
        if (errno == EBADF || errno == EINVAL || errno == ENOTSOCK || errno == EOPNOTSUPP)
            return system_error("cannot accept front ends", "server", errno);
        // What befell this one front end, or passes.
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    return FileDescriptor(-1);
}

Result<void> Server::serve_front_end(int socket) {
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    announced_size_ = disk_->size();
    Session session(socket, device_, options_);
    // Somebody else who connects is told nothing until then, so the server says it, once.
    bool others_wait = false;
    while (!stopping_) {
        std::vector<pollfd> polled = {{socket, POLLIN, 0}, {wakeup_.fd(), POLLIN, 0}};
        for (const auto& listener : listeners_) {
            if (!others_wait) polled.push_back({listener.fd(), POLLIN, 0});
        }
        if (poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR)
            return system_error("cannot wait for messages", "server", errno);
        wakeup_.quiet();
        if (const auto size = disk_->size(); size != announced_size_) {
            announced_size_ = size;
            session.announce_configuration();
        }
        const auto waits = [](const pollfd& listener) { return (listener.revents & POLLIN) != 0; };
        if (std::ranges::any_of(polled.begin() + 2, polled.end(), waits)) {
            others_wait = true;
            if (options_.complain) options_.complain("another front end waits until the one that is served has left");
        }
        if (polled[0].revents != 0 && !stopping_ && !TRY(session.serve_message())) return {};
        if (session.has_queues()) has_served_ = true;
    }
    return {};
}

Result<std::unique_ptr<VhostUserServer>> make_server(std::shared_ptr<Disk> disk, VhostUserOptions options) {
    const auto refuse = [](std::string why) { return fail(Errc::invalid_argument, "", std::move(why)); };
    if (options.queues == 0) options.queues = std::clamp(std::thread::hardware_concurrency(), 1U, usual_queues);
    if (options.queues > max_queues) return refuse(fmt::format("there are 1 to {} queues", max_queues));
    if (options.queue_size < 4 || options.queue_size > SplitRing::max_size || !std::has_single_bit(options.queue_size))
        return refuse(fmt::format("the size of a queue is a power of two from 4 to {}", SplitRing::max_size));
    if (options.block_size != 512 && options.block_size != 4096) return refuse("blocks have 512 or 4096 bytes");
    if (options.serial.size() > VIRTIO_BLK_ID_BYTES)
        return refuse(fmt::format("a serial number has at most {} bytes", VIRTIO_BLK_ID_BYTES));
    if (disk->size() < options.block_size) return refuse("the disk is smaller than one block");
    if (options.complain) {
        options.complain = [limited = std::make_shared<LimitedComplaints>(std::move(options.complain))](
                               const std::string& text) { (*limited)(text); };
    }
    auto server = std::make_unique<Server>(std::move(disk), std::move(options));
    if (!server->usable()) return system_error("cannot be made", "server", errno);
    return server;
}

}  // namespace

Result<std::unique_ptr<VhostUserServer>> VhostUserServer::make(std::shared_ptr<Disk> disk,
                                                               const VhostUserOptions& options) {
    return within_memory([&] { return make_server(std::move(disk), options); });
}

}  // namespace qcow
