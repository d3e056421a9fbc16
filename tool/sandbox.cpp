#include "sandbox.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <grp.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/landlock.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pwd.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <utility>

#include "failure.h"

#ifdef QCOW_SECCOMP
#include <seccomp.h>
#endif

namespace tool {
namespace {

/// Why a mechanism is not in force; empty: it is.
using Obstacle = std::string;
constexpr const char* denied = "this kernel does not have it, or does not allow it";

// The runtime of a sanitizer opens files, maps memory and stops threads, which the sandbox would forbid.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool sanitized = true;
#elif defined(__has_feature)
constexpr bool sanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
constexpr bool sanitized = false;
#endif

class Fd {
public:
    explicit Fd(int fd = -1) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd& operator=(Fd&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Fd() {
        if (fd_ >= 0) close(fd_);
    }
    [[nodiscard]] int get() const { return fd_; }

private:
    int fd_;
};

// ---- Another user ----

/// Makes the account the owner of the socket at `path`. Verifies that it is a socket, because another user may be able
/// to change its directory.
qcow::Result<void> give(const std::string& path, const passwd& account) {
    const Fd fd(::open(path.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    struct stat status = {};
    const bool is_socket = fd.get() >= 0 && fstat(fd.get(), &status) == 0 && S_ISSOCK(status.st_mode);
    if (!is_socket || fchownat(fd.get(), "", account.pw_uid, account.pw_gid, AT_EMPTY_PATH) != 0)
        return failure(qcow::Errc::access_denied, path, fmt::format("cannot make {} its owner", account.pw_name));
    return {};
}

/// Switches to the account for good, with its own group only.
qcow::Result<void> become(const passwd& account) {
    if (setgroups(0, nullptr) == 0 && setresgid(account.pw_gid, account.pw_gid, account.pw_gid) == 0 &&
        setresuid(account.pw_uid, account.pw_uid, account.pw_uid) == 0 && (account.pw_uid == 0 || setuid(0) != 0))
        return {};
    return failure(qcow::Errc::access_denied, fmt::format("user {}", account.pw_name),
                   fmt::format("cannot switch to this user; only root can ({})", std::strerror(errno)));
}

// ---- Landlock: which files, ports and processes can be reached ----

// By version of the kernel interface, because older headers do not define all of it.
constexpr std::uint64_t filesystem_rights(long version) {
    if (version >= 5) return (1U << 16) - 1;  // and ioctl on devices
    if (version >= 3) return (1U << 15) - 1;  // and truncate
    if (version >= 2) return (1U << 14) - 1;  // and linking across directories
    return (1U << 13) - 1;
}
constexpr std::uint64_t network_rights(long version) { return version >= 4 ? 3 : 0; }  // bind and connect by TCP
constexpr std::uint64_t scopes(long version) { return version >= 6 ? 3 : 0; }          // abstract sockets, signals

/// The newest struct landlock_ruleset_attr. A kernel that knows a shorter one accepts it if the rest is zero.
struct Ruleset {
    std::uint64_t filesystem = 0;
    std::uint64_t network = 0;
    std::uint64_t scoped = 0;
};

/// Opens the directories in its constructor, because a new user may not be allowed to. enter() confines the process.
class Landlock {
public:
    explicit Landlock(const std::vector<std::string>& removed) : obstacle_(prepare(removed)) {}

    Obstacle enter() const {
        if (!obstacle_.empty()) return obstacle_;
        return syscall(SYS_landlock_restrict_self, ruleset_.get(), 0) == 0 ? Obstacle() : std::strerror(errno);
    }

private:
    Obstacle prepare(const std::vector<std::string>& removed) {
        const long version = syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION);
        if (version < 1) return denied;
        const Ruleset rules{filesystem_rights(version), network_rights(version), scopes(version)};
        ruleset_ = Fd(static_cast<int>(syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0)));
        if (ruleset_.get() < 0) return std::strerror(errno);
        for (const auto& path : removed) {
            const auto directory = std::filesystem::path(path).parent_path().string();
            const Fd fd(::open(directory.empty() ? "." : directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
            landlock_path_beneath_attr beneath = {};
            beneath.allowed_access = LANDLOCK_ACCESS_FS_REMOVE_FILE;
            beneath.parent_fd = fd.get();
            if (syscall(SYS_landlock_add_rule, ruleset_.get(), LANDLOCK_RULE_PATH_BENEATH, &beneath, 0) != 0)
                return fmt::format("{}: {}", directory, std::strerror(errno));
        }
        return {};
    }

    Fd ruleset_;
    Obstacle obstacle_;
};

// ---- seccomp: which system calls can be made ----

#ifdef QCOW_SECCOMP

/// The system calls that serving needs.
constexpr std::array served_by = {
    // data
    SCMP_SYS(read), SCMP_SYS(readv), SCMP_SYS(pread64), SCMP_SYS(preadv), SCMP_SYS(preadv2), SCMP_SYS(write),
    SCMP_SYS(writev), SCMP_SYS(pwrite64), SCMP_SYS(pwritev), SCMP_SYS(pwritev2), SCMP_SYS(lseek), SCMP_SYS(fallocate),
    SCMP_SYS(ftruncate), SCMP_SYS(fdatasync), SCMP_SYS(fsync), SCMP_SYS(fstat), SCMP_SYS(fstatfs), SCMP_SYS(close),
    // clients
    SCMP_SYS(accept4), SCMP_SYS(recvfrom), SCMP_SYS(shutdown), SCMP_SYS(poll), SCMP_SYS(ppoll),
    // memory
    SCMP_SYS(brk), SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(madvise),
    // threads, and their end
    SCMP_SYS(futex), SCMP_SYS(set_robust_list), SCMP_SYS(rseq), SCMP_SYS(sched_yield), SCMP_SYS(sched_getaffinity),
    SCMP_SYS(gettid), SCMP_SYS(getpid), SCMP_SYS(rt_sigaction), SCMP_SYS(rt_sigprocmask), SCMP_SYS(rt_sigreturn),
    SCMP_SYS(restart_syscall), SCMP_SYS(exit), SCMP_SYS(exit_group),
    // time and chance
    SCMP_SYS(clock_gettime), SCMP_SYS(clock_getres), SCMP_SYS(clock_nanosleep), SCMP_SYS(nanosleep),
    SCMP_SYS(gettimeofday), SCMP_SYS(getrandom)};

/// What a process needs in addition, to share memory and events with others.
constexpr std::array sharing = {SCMP_SYS(recvmsg),     SCMP_SYS(epoll_create1), SCMP_SYS(epoll_ctl),
                                SCMP_SYS(epoll_wait),  SCMP_SYS(epoll_pwait),   SCMP_SYS(eventfd2),
                                SCMP_SYS(memfd_create)};

/// The options that are set on a client's socket. Others are dangerous: with one of them, root replaces the packet
/// filter.
constexpr std::array<std::pair<int, int>, 8> socket_options = {{{SOL_SOCKET, SO_SNDBUF},
                                                                {SOL_SOCKET, SO_RCVTIMEO},
                                                                {SOL_SOCKET, SO_SNDTIMEO},
                                                                {SOL_SOCKET, SO_KEEPALIVE},
                                                                {IPPROTO_TCP, TCP_NODELAY},
                                                                {IPPROTO_TCP, TCP_KEEPIDLE},
                                                                {IPPROTO_TCP, TCP_KEEPINTVL},
                                                                {IPPROTO_TCP, TCP_KEEPCNT}}};

/// System calls that only an attacker makes. They end the process. All other calls fail as if the kernel had none.
constexpr std::array deadly = {
    // programs and processes
    SCMP_SYS(execve), SCMP_SYS(execveat), SCMP_SYS(fork), SCMP_SYS(vfork), SCMP_SYS(ptrace), SCMP_SYS(kill),
    SCMP_SYS(tkill), SCMP_SYS(process_vm_readv), SCMP_SYS(process_vm_writev), SCMP_SYS(pidfd_open),
    SCMP_SYS(pidfd_getfd), SCMP_SYS(pidfd_send_signal), SCMP_SYS(setns), SCMP_SYS(unshare),
    // sockets
    SCMP_SYS(socket), SCMP_SYS(socketpair), SCMP_SYS(connect), SCMP_SYS(bind), SCMP_SYS(listen),
    // files
    SCMP_SYS(creat), SCMP_SYS(openat2), SCMP_SYS(open_by_handle_at), SCMP_SYS(truncate), SCMP_SYS(rename),
    SCMP_SYS(renameat), SCMP_SYS(renameat2), SCMP_SYS(link), SCMP_SYS(linkat), SCMP_SYS(symlink), SCMP_SYS(symlinkat),
    SCMP_SYS(mkdir), SCMP_SYS(mkdirat), SCMP_SYS(mknod), SCMP_SYS(mknodat), SCMP_SYS(chmod), SCMP_SYS(fchmod),
    SCMP_SYS(fchmodat), SCMP_SYS(chown), SCMP_SYS(lchown), SCMP_SYS(fchown), SCMP_SYS(fchownat),
    // the system
    SCMP_SYS(mount), SCMP_SYS(umount2), SCMP_SYS(pivot_root), SCMP_SYS(chroot), SCMP_SYS(bpf),
    SCMP_SYS(perf_event_open), SCMP_SYS(userfaultfd), SCMP_SYS(io_uring_setup), SCMP_SYS(init_module),
    SCMP_SYS(finit_module), SCMP_SYS(delete_module), SCMP_SYS(kexec_load), SCMP_SYS(kexec_file_load), SCMP_SYS(reboot),
    SCMP_SYS(keyctl), SCMP_SYS(add_key), SCMP_SYS(request_key), SCMP_SYS(setuid), SCMP_SYS(setgid), SCMP_SYS(setresuid),
    SCMP_SYS(setresgid), SCMP_SYS(setgroups), SCMP_SYS(capset), SCMP_SYS(personality)};

class Filter {
public:
    Filter() : context_(seccomp_init(SCMP_ACT_ERRNO(ENOSYS))) {
        if (context_ == nullptr) {
            failed_ = true;
            return;
        }
        set(SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_KILL_PROCESS);
        set(SCMP_FLTATR_CTL_TSYNC, 1);
        // Older kernels add a guard against speculative execution, which only processes that run foreign code need.
        set(SCMP_FLTATR_CTL_SSB, 1);
        set(SCMP_FLTATR_CTL_OPTIMIZE, 2);
    }
    Filter(const Filter&) = delete;
    Filter& operator=(const Filter&) = delete;
    ~Filter() { seccomp_release(context_); }

    /// Adds a rule for calls whose arguments meet all `conditions`.
    template <class... Conditions>
    void allow(int call, Conditions... conditions) {
        add(SCMP_ACT_ALLOW, call, conditions...);
    }
    template <class... Conditions>
    void kill(int call, Conditions... conditions) {
        add(SCMP_ACT_KILL_PROCESS, call, conditions...);
    }

    Obstacle load() {
        const bool loaded = !failed_ && seccomp_load(context_) == 0;
        return loaded ? "" : denied;
    }

private:
    template <class... Conditions>
    void add(std::uint32_t action, int call, Conditions... conditions) {
        failed_ = failed_ || seccomp_rule_add(context_, action, call, sizeof...(conditions), conditions...) != 0;
    }
    void set(scmp_filter_attr attribute, std::uint32_t value) {
        failed_ = failed_ || seccomp_attr_set(context_, attribute, value) != 0;
    }

    scmp_filter_ctx context_;
    bool failed_ = false;
};

constexpr scmp_arg_cmp argument(unsigned index, scmp_compare how, std::uint64_t a, std::uint64_t b = 0) {
    return {index, how, a, b};
}
/// Of the bits in `mask`, exactly `bits` are set.
constexpr scmp_arg_cmp has_bits(unsigned index, std::uint64_t mask, std::uint64_t bits) {
    return argument(index, SCMP_CMP_MASKED_EQ, mask, bits);
}

Obstacle enter_seccomp(bool removes, bool shares_memory) {
    Filter filter;
    for (const int call : served_by) filter.allow(call);
    for (const int call : deadly) filter.kill(call);
    if (shares_memory) {
        for (const int call : sharing) filter.allow(call);
        filter.allow(SCMP_SYS(sendmsg), has_bits(2, MSG_FASTOPEN, 0));
        filter.kill(SCMP_SYS(sendmsg), has_bits(2, MSG_FASTOPEN, MSG_FASTOPEN));
    } else {
        filter.kill(SCMP_SYS(memfd_create));
    }

    // Sending to an address, and opening a connection with the first data, are ways to connect.
    filter.allow(SCMP_SYS(sendto), has_bits(3, MSG_FASTOPEN, 0), argument(4, SCMP_CMP_EQ, 0));
    filter.kill(SCMP_SYS(sendto), has_bits(3, MSG_FASTOPEN, MSG_FASTOPEN));
    filter.kill(SCMP_SYS(sendto), argument(4, SCMP_CMP_NE, 0));
    for (const auto& [level, option] : socket_options) {
        filter.allow(SCMP_SYS(setsockopt), argument(1, SCMP_CMP_EQ, static_cast<std::uint64_t>(level)),
                     argument(2, SCMP_CMP_EQ, static_cast<std::uint64_t>(option)));
    }
    for (const std::uint64_t command : {F_GETFL, F_SETFL, F_OFD_GETLK, F_OFD_SETLK})
        filter.allow(SCMP_SYS(fcntl), argument(1, SCMP_CMP_EQ, command));
    for (const std::uint64_t command : {std::uint64_t{BLKGETSIZE64}, std::uint64_t{FS_IOC_FIEMAP}})
        filter.allow(SCMP_SYS(ioctl), argument(1, SCMP_CMP_EQ, command));
    filter.allow(SCMP_SYS(newfstatat),
                 has_bits(3, AT_EMPTY_PATH, AT_EMPTY_PATH));  // fstat uses it; a filter cannot see the path
    filter.allow(SCMP_SYS(tgkill), argument(0, SCMP_CMP_EQ, static_cast<std::uint64_t>(getpid())));  // abort
    for (const int call : {SCMP_SYS(mmap), SCMP_SYS(mprotect)}) filter.allow(call, has_bits(2, PROT_EXEC, 0));
    if (removes)
        for (const int call : {SCMP_SYS(unlink), SCMP_SYS(unlinkat)}) filter.allow(call);

    // Threads. clone3 has its flags in memory, which a filter cannot see. It fails like an unknown call, and the C
    // library then uses clone.
    constexpr std::uint64_t thread = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD;
    constexpr std::uint64_t namespaces =
        CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;
    filter.allow(SCMP_SYS(clone), has_bits(0, thread | namespaces, thread));
    filter.kill(SCMP_SYS(clone), has_bits(0, CLONE_THREAD, 0));

    // Opening a file for reading only fails, because libraries try it and can do without.
    for (const auto& [call, flags] : {std::pair{SCMP_SYS(open), 1U}, {SCMP_SYS(openat), 2U}}) {
        for (const std::uint64_t mode : {O_WRONLY, O_RDWR}) filter.kill(call, has_bits(flags, O_ACCMODE, mode));
        for (const std::uint64_t flag : {O_CREAT, O_TRUNC}) filter.kill(call, has_bits(flags, flag, flag));
    }
    return filter.load();
}

#else

Obstacle enter_seccomp(bool, bool) { return "qcow was built without libseccomp"; }

#endif

void set_limits(const ProcessLimits& limits) {
    const auto set = [](auto resource, rlim_t soft, rlim_t hard) {
        const rlimit limit{soft, hard};
        setrlimit(resource, &limit);
    };
    set(RLIMIT_DATA, limits.memory_bytes, limits.memory_bytes);
    set(RLIMIT_CPU, limits.processor_seconds, RLIM_INFINITY);
    set(RLIMIT_CORE, 0, 0);
    if (!limits.writes_files) set(RLIMIT_FSIZE, 0, 0);
}

}  // namespace

qcow::Result<std::string> enter_sandbox(const Sandbox& sandbox) {
    const auto* account = sandbox.user.empty() ? nullptr : getpwnam(sandbox.user.c_str());
    if (account == nullptr && !sandbox.user.empty())
        return failure(qcow::Errc::not_found, fmt::format("user {}", sandbox.user), "there is no such user");
    const bool automatic = sandbox.mode == "auto";
    const bool wanted = sandbox.mode == "on" || (automatic && !sanitized);
    if (wanted && sanitized)
        return failure(qcow::Errc::unsupported, "option --sandbox", "a build with sanitizers cannot be confined");

    if (sandbox.limits && !sanitized) set_limits(*sandbox.limits);
    const Landlock landlock(sandbox.removed);
    if (account != nullptr) {
        for (const auto& path : sandbox.given)
            if (auto given = give(path, *account); !given) return std::unexpected(std::move(given).error());
        if (auto done = become(*account); !done) return std::unexpected(std::move(done).error());
    }
    std::vector<std::string> parts;
    std::vector<std::string> missing;
    if (wanted) {
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);  // required by Landlock and seccomp
        const auto note = [&](const char* name, const Obstacle& obstacle) {
            if (obstacle.empty()) parts.emplace_back(name);
            if (!obstacle.empty()) missing.push_back(fmt::format("no {}: {}", name, obstacle));
        };
        note("Landlock", landlock.enter());
        note("seccomp", enter_seccomp(!sandbox.removed.empty(), sandbox.shares_memory));
        if (!automatic && !missing.empty()) {
            return failure(qcow::Errc::unsupported, "option --sandbox=on",
                           fmt::format("{}; --sandbox=auto starts without it", fmt::join(missing, "; ")));
        }
    } else {
        missing.emplace_back(automatic ? "this is a build with sanitizers" : "--sandbox=off");
    }
    if (parts.empty()) parts.emplace_back("off");
    if (account != nullptr) parts.push_back(fmt::format("user {}", account->pw_name));
    auto text = fmt::format("{}", fmt::join(parts, ", "));
    if (!missing.empty()) text += fmt::format(" ({})", fmt::join(missing, "; "));
    return text;
}

}  // namespace tool
