// Performs the kernel's requests on threads.

#include "qcow/mount.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <filesystem>
#include <thread>
#include <utility>
#include <vector>

#include "base/page_memory.h"
#include "base/within_memory.h"
#include "server/fuse/mounting.h"
#include "server/fuse/operations.h"
#include "server/wakeup.h"
#include "storage/file.h"

namespace qcow {
namespace {

constexpr unsigned most_threads = 64;
/// Threads for a slow disk, if the caller does not say how many.
constexpr unsigned threads_of_slow_disk = 16;

/// What precedes the data of a write. The data then begin with a page.
constexpr std::size_t header_bytes = sizeof(fuse_in_header) + sizeof(fuse_write_in);
constexpr std::size_t page_bytes = 4096;

/// The device that this thread has its requests from. Its replies must go there.
thread_local int device_of_thread = -1;

ssize_t send_reply(int fd, iovec* pieces, int count, void*) {
    return writev(device_of_thread >= 0 ? device_of_thread : fd, pieces, count);
}
ssize_t receive(int fd, void* to, std::size_t bytes, void*) { return read(fd, to, bytes); }

class FuseMount final : public Mount {
public:
    FuseMount(std::shared_ptr<Disk> disk, fuse::Tree tree, const struct stat& mount_point, const MountOptions& options)
        : disk_(std::move(disk)), options_(options) {
        files_.tree = std::move(tree);
        files_.mount_point = mount_point;
        files_.failed = options.failed;
    }
    ~FuseMount() override {
        disconnect();
        unmount();
    }

    Result<void> mount(const std::string& target);
    Result<void> run() override;
    void stop() noexcept override {
        stopping_ = true;
        wakeup_.ring();
    }

private:
    [[nodiscard]] std::size_t most_workers() const;
    void open_devices(int connection);
    Result<void> add_worker();
    Result<void> add_workers();
    void work(int device_fd);
    void receive_requests(int fd, std::byte* memory);
    [[nodiscard]] bool is_unmounted();
    void unmount();
    void disconnect();

    std::shared_ptr<Disk> disk_;
    MountOptions options_;
    fuse::Files files_;
    std::string target_;
    fuse_session* session_ = nullptr;
    bool mounted_ = false;
    std::vector<FileDescriptor> devices_;  // a worker's own, by its number
    Wakeup wakeup_;
    std::atomic<bool> stopping_ = false;
    std::atomic<bool> unmounted_ = false;  // somebody else has unmounted
    std::atomic<bool> ending_ = false;     // no more requests are performed
    std::atomic<int> failure_ = 0;         // errno of the connection to the kernel
    std::atomic<unsigned> waiting_ = 0;    // threads that wait for a request
    std::atomic<bool> short_of_workers_ = false;
    std::vector<std::thread> workers_;
};

Result<void> FuseMount::mount(const std::string& target) {
    if (wakeup_.fd() < 0) return system_error("cannot be made", "mount", errno);
    target_ = std::filesystem::absolute(target);
    const auto settings = fmt::format("max_read={}", fuse::max_transfer);
    std::array<const char*, 3> arguments = {"qcow", "-o", settings.c_str()};
    fuse_args list = FUSE_ARGS_INIT(static_cast<int>(arguments.size()), const_cast<char**>(arguments.data()));
    session_ = fuse_session_new(&list, &fuse::operations(), sizeof(fuse_lowlevel_ops), &files_);
    fuse_opt_free_args(&list);
    if (session_ == nullptr) return fail(Errc::unsupported, target, "libfuse refuses to begin");
    auto connection = TRY(fuse::mount(target_, files_.mount_point, options_));
    mounted_ = true;
    open_devices(connection.get());
    const fuse_custom_io io = {
        .writev = send_reply, .read = receive, .splice_receive = nullptr, .splice_send = nullptr};
    if (fuse_session_custom_io(session_, &io, connection.get()) != 0) return fail(Errc::no_memory, "", "out of memory");
    static_cast<void>(connection.release());  // the session closes it
    return {};
}

std::size_t FuseMount::most_workers() const {
    return options_.threads != 0 ? std::min(options_.threads, most_threads) : threads_of_slow_disk;
}

/// Opens a device for each thread: replies then do not contend for the lock of one. Later the process may be confined.
void FuseMount::open_devices(int connection) {
    auto shared = static_cast<std::uint32_t>(connection);
    while (devices_.size() < most_workers()) {
        FileDescriptor own(open(fuse::device, O_RDWR | O_CLOEXEC));
        if (own.get() < 0 || ioctl(own.get(), FUSE_DEV_IOC_CLONE, &shared) != 0) return;
        devices_.push_back(std::move(own));
    }
}

Result<void> FuseMount::add_worker() {
    const auto number = workers_.size();
    const int own = number < devices_.size() ? devices_[number].get() : fuse_session_fd(session_);
    try {
        workers_.emplace_back([this, own] { work(own); });
    } catch (const std::system_error& error) {
        return system_error("cannot start a thread", "mount", error.code().value());
    }
    return {};
}

/// Starts the first threads. One is enough.
Result<void> FuseMount::add_workers() {
    const auto wanted = options_.threads != 0 ? most_workers() : std::max(std::thread::hardware_concurrency(), 2U);
    while (workers_.size() < std::min<std::size_t>(wanted, most_workers()))
        if (auto added = add_worker(); !added && workers_.empty()) return added;
    return {};
}

/// What a thread does. It can be cancelled while it waits for a request: nothing else wakes it up.
void FuseMount::work(int device_fd) {
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, nullptr);
    const auto done = within_memory([&]() -> Result<void> {
        // The memory of a request, so placed that the data of a write begin with a page; and of what is read, for which
        // the same pages serve: a read carries no data.
        const PageMemory memory(page_bytes + fuse::max_transfer + page_bytes);
        fuse::read_memory = {memory.data() + page_bytes, fuse::max_transfer};
        device_of_thread = device_fd;
        receive_requests(device_fd, memory.data());
        return {};
    });
    if (!done) failure_ = ENOMEM;
    wakeup_.ring();
}

void FuseMount::receive_requests(int fd, std::byte* memory) {
    auto* const request = memory + page_bytes - header_bytes;
    while (!ending_) {
        ++waiting_;
        pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, nullptr);
        const auto count = read(fd, request, header_bytes + fuse::max_transfer + page_bytes);
        const int error = errno;
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, nullptr);
        if (--waiting_ == 0 && files_.pace.is_slow() && !short_of_workers_.exchange(true)) wakeup_.ring();
        if (count < 0) {
            if (error == EINTR || error == EAGAIN || error == ENOENT) continue;  // ENOENT: the request was withdrawn
            if (error == ENODEV) unmounted_ = true;
            if (error != ENODEV) failure_ = error;
            return;
        }
        fuse_buf received = {};
        received.size = static_cast<std::size_t>(count);
        received.mem = request;
        fuse_session_process_buf(session_, &received);
        if (fuse_session_exited(session_) != 0) {
            failure_ = EPROTO;
            return;
        }
    }
}

Result<void> FuseMount::run() {
    auto result = add_workers();
    while (result && !stopping_ && !unmounted_ && failure_ == 0) {
        pollfd polled = {wakeup_.fd(), POLLIN, 0};
        poll(&polled, 1, -1);
        wakeup_.quiet();
        // With as many threads as there may be, the mark stays, and nobody asks again.
        if (short_of_workers_ && workers_.size() < most_workers() && add_worker()) short_of_workers_ = false;
    }
    // While requests are performed: the kernel sends what programs have written by mmap() and not synchronised.
    if (result && failure_ == 0) unmount();
    disconnect();
    unmount();
    if (result && failure_ != 0) result = system_error("the connection to the kernel failed", target_, failure_);
    if (options_.read_only) return result;
    auto flushed = disk_->flush();
    return result ? std::move(flushed) : std::move(result);
}

bool FuseMount::is_unmounted() {
    if (session_ != nullptr) {
        pollfd polled = {fuse_session_fd(session_), 0, 0};
        if (poll(&polled, 1, 0) == 1 && (polled.revents & POLLERR) != 0) unmounted_ = true;
    }
    return unmounted_;
}

/// Unmounts, unless that is done.
void FuseMount::unmount() {
    if (!mounted_ || is_unmounted()) return;
    mounted_ = false;
    if (options_.unmount) {
        options_.unmount();
    } else {
        Mount::unmount(target_);
    }
}

/// Ends the connection to the kernel: programs that have a file open get errors, and nobody waits.
void FuseMount::disconnect() {
    ending_ = true;
    for (auto& worker : workers_) pthread_cancel(worker.native_handle());
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    if (session_ == nullptr) return;
    static_cast<void>(is_unmounted());
    fuse_session_destroy(std::exchange(session_, nullptr));
    devices_.clear();
}

Result<std::unique_ptr<Mount>> make_mount(std::shared_ptr<Disk> disk, const std::string& target,
                                          const MountOptions& options) {
    const auto mount_point = TRY(fuse::verify_mount_point(target));
    TRY_VOID(fuse::verify_system());
    if (!options.read_only) TRY_VOID(disk->write({0}, {}));
    auto tree = S_ISREG(mount_point.st_mode) ? fuse::Tree::of_file(disk, !options.read_only)
                                             : TRY(fuse::Tree::of_directory(disk, !options.read_only));
    auto mount = std::make_unique<FuseMount>(std::move(disk), std::move(tree), mount_point, options);
    TRY_VOID(mount->mount(target));
    return mount;
}

}  // namespace

Result<std::unique_ptr<Mount>> Mount::make(std::shared_ptr<Disk> disk, const std::string& target,
                                           const MountOptions& options) {
    return within_memory([&] { return make_mount(std::move(disk), target, options); });
}

}  // namespace qcow
