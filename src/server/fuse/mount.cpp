// Mounts a disk, and performs the kernel's requests on threads.

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
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <list>
#include <thread>

#include "base/page_memory.h"
#include "base/within_memory.h"
#include "server/fuse/operations.h"
#include "server/wakeup.h"
#include "storage/file.h"

namespace qcow {
namespace {

constexpr const char* device = "/dev/fuse";
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

// ---- Mounting ----

/// Collects what libfuse says, which it otherwise prints. One at a time.
class Messages {
public:
    Messages() : lock_(mutex) {
        text.clear();
        fuse_set_log_func([](fuse_log_level, const char* format, va_list arguments) {
            std::array<char, 512> line = {};
            std::vsnprintf(line.data(), line.size(), format, arguments);
            text += line.data();
        });
    }
    Messages(const Messages&) = delete;
    Messages& operator=(const Messages&) = delete;
    ~Messages() { fuse_set_log_func(nullptr); }

    /// Returns them as one line, without libfuse's name in front.
    [[nodiscard]] static std::string line() {
        auto result = text.starts_with("fuse: ") ? text.substr(6) : text;
        while (result.ends_with('\n')) result.pop_back();
        std::ranges::replace(result, '\n', ' ');
        return result;
    }

private:
    static std::mutex mutex;
    static std::string text;
    std::lock_guard<std::mutex> lock_;
};
std::mutex Messages::mutex;
std::string Messages::text;

bool has_program(const std::string& name) {
    const char* const path = std::getenv("PATH");
    for (std::string_view rest = path == nullptr ? "" : path, directories = "/usr/bin:/bin:/usr/local/bin";
         !rest.empty() || !directories.empty();) {
        if (rest.empty()) std::swap(rest, directories);
        const auto directory = rest.substr(0, rest.find(':'));
        rest.remove_prefix(std::min(directory.size() + 1, rest.size()));
        if (access(fmt::format("{}/{}", directory, name).c_str(), X_OK) == 0) return true;
    }
    return false;
}

/// Returns what the mount point is, if a disk can be mounted there.
Result<struct stat> verify_mount_point(const std::string& target) {
    struct stat status = {};
    if (stat(target.c_str(), &status) != 0) {
        if (errno == ENOENT) {
            return fail(Errc::not_found, target,
                        "there is nothing to mount on; make an empty file (touch) or an empty directory (mkdir)");
        }
        if (errno == ENOTCONN) {
            return fail(Errc::access_denied, target,
                        "an earlier mount is left there, and its process is gone; use fusermount3 -u or umount");
        }
        return system_error("cannot be mounted on", target, errno);
    }
    if (S_ISREG(status.st_mode)) return status;
    if (!S_ISDIR(status.st_mode))
        return fail(Errc::invalid_argument, target, "it is neither a regular file nor a directory");
    std::error_code error;
    const bool empty = std::filesystem::is_empty(target, error);
    if (error) return system_error("cannot be read", target, error.value());
    if (!empty) return fail(Errc::invalid_argument, target, "the directory is not empty; name an empty one, or a file");
    return status;
}

Result<void> verify_system() {
    if (access(device, F_OK) != 0) {
        return fail(Errc::unsupported, device,
                    "this system has no FUSE; load the kernel module (modprobe fuse), or give the container the device "
                    "(docker: --device /dev/fuse --cap-add SYS_ADMIN)");
    }
    if (access(device, R_OK | W_OK) != 0) {
        return fail(Errc::access_denied, device,
                    "this user may not open it; root can allow it (chmod 0666 /dev/fuse), or mount");
    }
    if (geteuid() != 0 && !has_program("fusermount3")) {
        return fail(Errc::unsupported, "fusermount3",
                    "users other than root mount by this program; install it (Debian: fuse3)");
    }
    return {};
}

// ---- Serving ----

class FuseMount final : public Mount {
public:
    FuseMount(std::shared_ptr<Disk> disk, fuse::Tree tree, const struct stat& mount_point, const MountOptions& options)
        : disk_(std::move(disk)), options_(options) {
        files_.tree = std::move(tree);
        files_.mount_point = mount_point;
        files_.failed = options.failed;
    }
    ~FuseMount() override {
        unmount();
        if (session_ != nullptr) fuse_session_destroy(session_);
    }

    Result<void> mount(const std::string& target);
    Result<void> run() override;
    void stop() noexcept override {
        stopping_ = true;
        wakeup_.ring();
    }

private:
    struct Worker {
        explicit Worker(int fd) : device(fd) {}
        FileDescriptor device;  // -1: the session's
        std::thread thread;
    };

    [[nodiscard]] std::size_t most_workers() const;
    Result<void> add_worker();
    Result<void> add_workers();
    void work(const Worker& worker);
    void receive_requests(int fd, std::byte* memory);
    void send_cached_writes() const;
    void end_workers();
    void unmount() {
        if (session_ != nullptr) fuse_session_unmount(session_);
    }

    std::shared_ptr<Disk> disk_;
    MountOptions options_;
    fuse::Files files_;
    std::string target_;
    fuse_session* session_ = nullptr;
    Wakeup wakeup_;
    std::atomic<bool> stopping_ = false;
    std::atomic<bool> unmounted_ = false;  // somebody else has unmounted
    std::atomic<bool> ending_ = false;     // no more requests are performed
    std::atomic<int> failure_ = 0;         // errno of the connection to the kernel
    std::atomic<unsigned> waiting_ = 0;    // threads that wait for a request
    std::atomic<bool> short_of_workers_ = false;
    std::list<Worker> workers_;
};

Result<void> FuseMount::mount(const std::string& target) {
    if (wakeup_.fd() < 0) return system_error("cannot be made", "mount", errno);
    target_ = std::filesystem::absolute(target);
    const auto settings =
        fmt::format("fsname=qcow,subtype=qcow,default_permissions,max_read={}{}{}", fuse::max_transfer,
                    options_.allow_other ? ",allow_other" : "", options_.read_only ? ",ro" : "");
    std::array<const char*, 3> arguments = {"qcow", "-o", settings.c_str()};
    fuse_args list = FUSE_ARGS_INIT(static_cast<int>(arguments.size()), const_cast<char**>(arguments.data()));
    const Messages messages;
    session_ = fuse_session_new(&list, &fuse::operations(), sizeof(fuse_lowlevel_ops), &files_);
    fuse_opt_free_args(&list);
    if (session_ == nullptr) return fail(Errc::unsupported, target, "libfuse: " + Messages::line());
    if (fuse_session_mount(session_, target_.c_str()) != 0) {
        return fail(Errc::access_denied, target,
                    fmt::format("cannot be mounted on: {}",
                                Messages::line().empty() ? "fusermount3 refuses it" : Messages::line()));
    }
    const fuse_custom_io io = {
        .writev = send_reply, .read = receive, .splice_receive = nullptr, .splice_send = nullptr};
    if (fuse_session_custom_io(session_, &io, fuse_session_fd(session_)) != 0)
        return fail(Errc::no_memory, "", "out of memory");
    fcntl(fuse_session_fd(session_), F_SETFD, FD_CLOEXEC);
    return {};
}

std::size_t FuseMount::most_workers() const {
    return options_.threads != 0 ? std::min(options_.threads, most_threads) : threads_of_slow_disk;
}

/// Starts a thread, with a device of its own: replies then do not contend for the lock of one.
Result<void> FuseMount::add_worker() {
    int own = workers_.empty() ? -1 : open(device, O_RDWR | O_CLOEXEC);
    auto shared = static_cast<std::uint32_t>(fuse_session_fd(session_));
    if (own >= 0 && ioctl(own, FUSE_DEV_IOC_CLONE, &shared) != 0) {
        close(own);
        own = -1;
    }
    auto& worker = workers_.emplace_back(own);
    try {
        worker.thread = std::thread([this, &worker] { work(worker); });
    } catch (const std::system_error& error) {
        workers_.pop_back();
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
void FuseMount::work(const Worker& worker) {
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, nullptr);
    const auto done = within_memory([&]() -> Result<void> {
        // The memory of a request, so placed that the data of a write begin with a page; and of what is read, for which
        // the same pages serve: a read carries no data.
        const PageMemory memory(page_bytes + fuse::max_transfer + page_bytes);
        fuse::read_memory = {memory.data() + page_bytes, fuse::max_transfer};
        device_of_thread = worker.device.get();
        receive_requests(worker.device.get() >= 0 ? worker.device.get() : fuse_session_fd(session_), memory.data());
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
    if (result && stopping_ && !unmounted_) send_cached_writes();
    end_workers();
    unmount();
    if (result && failure_ != 0) result = system_error("the connection to the kernel failed", target_, failure_);
    if (options_.read_only) return result;
    auto flushed = disk_->flush();
    return result ? std::move(flushed) : std::move(result);
}

/// Lets the kernel send what programs have written by mmap() and not synchronised.
void FuseMount::send_cached_writes() const {
    if (options_.read_only) return;
    const FileDescriptor file(open(target_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (file.get() >= 0) ::fsync(file.get());
}

void FuseMount::end_workers() {
    ending_ = true;
    for (auto& worker : workers_) pthread_cancel(worker.thread.native_handle());
    for (auto& worker : workers_) worker.thread.join();
    workers_.clear();
}

Result<std::unique_ptr<Mount>> make_mount(std::shared_ptr<Disk> disk, const std::string& target,
                                          const MountOptions& options) {
    const auto mount_point = TRY(verify_mount_point(target));
    TRY_VOID(verify_system());
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
