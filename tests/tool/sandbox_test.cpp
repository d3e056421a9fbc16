// What a process can still do in the sandbox, and what it dies of: each in a process of its own.

#include "tool/sandbox.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <linux/io_uring.h>
#include <linux/openat2.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <functional>
#include <thread>

#include "support/disks.h"
#include "support/temporary_directory.h"

#ifdef QCOW_SECCOMP
#include <seccomp.h>
#endif

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

/// How a process ended, and what it said.
struct Ended {
    int status = 0;  // 128 + N if signal N ended it
    std::string said;
};

Ended in_a_process(const std::function<int(int out)>& work) {
    int out[2] = {};
    if (pipe2(out, O_CLOEXEC) != 0) throw std::runtime_error("pipe2");
    const pid_t pid = fork();
    if (pid == 0) {
        close(out[0]);
        _exit(work(out[1]));
    }
    close(out[1]);
    Ended ended;
    char piece[4096];
    for (ssize_t n = 0; (n = read(out[0], piece, sizeof piece)) > 0;)
        ended.said.append(piece, static_cast<std::size_t>(n));
    close(out[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    ended.status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    return ended;
}

/// What enter_sandbox says in a process of its own.
std::string state_of(const tool::Sandbox& sandbox, const std::function<void()>& before = [] {}) {
    return in_a_process([&](int out) {
               before();
               const auto entered = tool::enter_sandbox(sandbox);
               const auto text = entered ? *entered : "error: " + entered.error().message();
               return write(out, text.data(), text.size()) < 0 ? 1 : 0;
           })
        .said;
}

constexpr int killed = 128 + SIGSYS;
constexpr int works = 0;

/// Something that a process tries: 0, or -1 and errno.
struct Action {
    const char* name;
    int expected;  // works, an errno, or killed
    std::function<long()> act;
};

class SandboxTest : public testing::Test {
protected:
    void SetUp() override {
        const auto state = state_of({});
        if (state != "Landlock, seccomp") GTEST_SKIP() << "this system confines with: " << state;
        put_file(home_ / "socket", "");
        put_file(home_ / "neighbour", "");
        put_file(other_ / "file", "contents");
    }

    void expect_outcomes(const tool::Sandbox& sandbox, const std::vector<Action>& actions) const {
        for (const auto& action : actions) {
            const auto ended = in_a_process([&](int) {
                if (!tool::enter_sandbox(sandbox)) return 255;
                return action.act() >= 0 ? 0 : errno;
            });
            EXPECT_EQ(ended.status, action.expected) << action.name;
        }
    }

    TemporaryDirectory home_;
    TemporaryDirectory other_;
    const int file_ = open((other_ / "open").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    tool::Sandbox sandbox_ = {"on", "", {}, {home_ / "socket"}};
};

TEST_F(SandboxTest, WhatServingTakesWorks) {
    const int event = eventfd(0, EFD_CLOEXEC);
    const int by_network = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    (other_ / "listener").copy(address.sun_path, sizeof address.sun_path - 1);
    ASSERT_EQ(bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    ASSERT_EQ(listen(listener, 5), 0);
    std::vector<int> clients;
    for (int i = 0; i < 20; ++i) {
        clients.push_back(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        // As many as the backlog holds.
        fcntl(clients.back(), F_SETFL, O_NONBLOCK);
        connect(clients.back(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
    }
    const auto set_tcp_options = [&] {
        const int seconds = 60;
        for (const int option : {TCP_NODELAY, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT})
            if (setsockopt(by_network, IPPROTO_TCP, option, &seconds, sizeof seconds) != 0) return -1L;
        return 0L;
    };
    char buffer[16] = {};
    expect_outcomes(sandbox_,
                    {
                        {"write a file", works, [&] { return pwrite(file_, "x", 1, 5); }},
                        {"read a file", works, [&] { return pread(file_, buffer, 1, 5); }},
                        {"resize a file", works, [&] { return ftruncate(file_, 1 << 20); }},
                        {"punch a hole", works,
                         [&] { return fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096); }},
                        {"reserve space", works, [&] { return -posix_fallocate(file_, 0, 8192); }},
                        {"flush", works, [&] { return fdatasync(file_); }},
                        {"find data", works, [&] { return lseek(file_, 0, SEEK_HOLE); }},
                        {"tell the size", works,
                         [&] {
                             struct stat status = {};
                             return fstat(file_, &status);
                         }},
                        {"lock", works,
                         [&] {
                             struct flock lock = {};
                             lock.l_type = F_RDLCK;
                             return fcntl(file_, F_OFD_SETLK, &lock);
                         }},
                        {"wake up", works, [&] { return write(event, "\1\0\0\0\0\0\0\0", 8); }},
                        {"take a client", works,
                         [&] {
                             const int client = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
                             const timeval patience = {1, 0};
                             const int yes = 1;
                             if (setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) != 0 ||
                                 setsockopt(client, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes) != 0)
                                 return ssize_t{-1};
                             return send(client, "x", 1, MSG_NOSIGNAL);
                         }},
                        {"notice when a client vanishes", works, set_tcp_options},
                        {"have threads, with memory of their own", works,
                         [] {
                             std::vector<std::thread> threads;
                             for (int i = 0; i < 8; ++i)
                                 threads.emplace_back([] { std::vector<char>(1 << 22, 'x').back() = 'y'; });
                             for (auto& thread : threads) thread.join();
                             return 0L;
                         }},
                        {"throw", works,
                         [] {
                             try {
                                 throw std::runtime_error("thrown");
                             } catch (const std::exception&) {
                                 return 0L;
                             }
                         }},
                        {"remove its file", works, [&] { return unlink((home_ / "socket").c_str()); }},
                        {"give up", 128 + SIGABRT, []() -> long { std::abort(); }},
                    });
    for (const int fd : clients) close(fd);
    close(listener);
    close(event);
    close(by_network);
}

TEST_F(SandboxTest, WhatItDiesOf) {
    const auto fresh = other_ / "fresh";
    const auto there = other_ / "file";
    const pid_t parent = getpid();
    char* const arguments[] = {const_cast<char*>("true"), nullptr};
    char byte = 0;
    const iovec local = {&byte, 1};
    open_how how = {};
    sockaddr_in local_address = {};
    local_address.sin_family = AF_INET;
    const auto* anywhere = reinterpret_cast<const sockaddr*>(&local_address);
    io_uring_params parameters = {};
    expect_outcomes(
        sandbox_,
        {
            {"open a file for writing", killed, [&] { return open(there.c_str(), O_WRONLY); }},
            {"open a file for both", killed, [&] { return open(there.c_str(), O_RDWR); }},
            {"make a file", killed, [&] { return open(fresh.c_str(), O_WRONLY | O_CREAT, 0600); }},
            {"make a file to read", killed, [&] { return open(fresh.c_str(), O_RDONLY | O_CREAT, 0600); }},
            {"make a file without a name", killed,
             [&] { return open(other_.path().c_str(), O_TMPFILE | O_RDWR, 0600); }},
            {"empty a file", killed, [&] { return open(there.c_str(), O_RDONLY | O_TRUNC); }},
            {"creat", killed, [&] { return creat(fresh.c_str(), 0600); }},
            {"openat2", killed, [&] { return syscall(SYS_openat2, AT_FDCWD, there.c_str(), &how, sizeof how); }},
            {"truncate", killed, [&] { return truncate(there.c_str(), 0); }},
            {"rename", killed, [&] { return rename(there.c_str(), fresh.c_str()); }},
            {"link", killed, [&] { return link(there.c_str(), fresh.c_str()); }},
            {"symlink", killed, [&] { return symlink(there.c_str(), fresh.c_str()); }},
            {"mkdir", killed, [&] { return mkdir(fresh.c_str(), 0700); }},
            {"chmod", killed, [&] { return chmod(there.c_str(), 0777); }},
            {"memfd_create", killed, [] { return memfd_create("code", 0); }},
            {"socket", killed, [] { return socket(AF_INET, SOCK_STREAM, 0); }},
            {"socketpair", killed,
             [] {
                 int pair[2];
                 return socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
             }},
            {"connect", killed, [&] { return connect(file_, nullptr, 0); }},
            {"send to an address", killed, [&] { return sendto(file_, "x", 1, 0, anywhere, sizeof(sockaddr_in)); }},
            {"connect with the first data", killed,
             [&] { return sendto(file_, "x", 1, MSG_FASTOPEN, anywhere, sizeof(sockaddr_in)); }},
            {"the same to nobody", killed, [&] { return send(file_, "x", 1, MSG_FASTOPEN); }},
            {"execve", killed, [&] { return execve("/bin/true", arguments, nullptr); }},
            {"fork", killed, [] { return fork(); }},
            {"kill", killed, [&] { return kill(parent, 0); }},
            {"ptrace", killed, [&] { return ptrace(PTRACE_ATTACH, parent, nullptr, nullptr); }},
            {"process_vm_readv", killed, [&] { return process_vm_readv(parent, &local, 1, &local, 1, 0); }},
            {"unshare", killed, [] { return unshare(CLONE_NEWUSER); }},
            {"mount", killed, [&] { return mount("none", other_.path().c_str(), "tmpfs", 0, nullptr); }},
            {"bpf", killed, [] { return syscall(SYS_bpf, 0, nullptr, 0); }},
            {"io_uring_setup", killed, [&] { return syscall(SYS_io_uring_setup, 1, &parameters); }},
            {"setuid", killed, [] { return setuid(0); }},
        });
    EXPECT_FALSE(std::filesystem::exists(fresh));
    EXPECT_EQ(file_bytes(there), "contents");
}

TEST_F(SandboxTest, WhatFails) {
    const pid_t parent = getpid();
    const int number = 1;
    msghdr message = {};
    const auto page = [](int protection) {
        return mmap(nullptr, 4096, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    };
    const std::vector<Action> actions = {
        {"read a file", ENOSYS, [&] { return open("/etc/passwd", O_RDONLY); }},
        {"look at a file", ENOSYS,
         [&] {
             struct stat status = {};
             return stat("/etc/passwd", &status);
         }},
        {"have memory to run", ENOSYS, [&] { return page(PROT_READ | PROT_EXEC) == MAP_FAILED ? -1L : 0L; }},
        {"let memory be run", ENOSYS, [&] { return mprotect(page(PROT_READ), 4096, PROT_READ | PROT_EXEC); }},
        {"signal another process", ENOSYS, [&] { return syscall(SYS_tgkill, parent, parent, 0); }},
        {"talk to a device", ENOSYS, [&] { return ioctl(file_, 0x1234, 0); }},
        {"go elsewhere", ENOSYS, [] { return chdir("/"); }},
        {"send a message", ENOSYS, [&] { return sendmsg(file_, &message, 0); }},
        {"receive a message", ENOSYS, [&] { return recvmsg(file_, &message, 0); }},
        {"send messages", ENOSYS, [&] { return syscall(SYS_sendmmsg, file_, nullptr, 0, 0); }},
        {"change a socket's mark", ENOSYS,
         [&] { return setsockopt(file_, SOL_SOCKET, SO_MARK, &number, sizeof number); }},
        {"replace the packet filter", ENOSYS,
         [&] { return setsockopt(file_, IPPROTO_IP, 64, &number, sizeof number); }},
        {"put TCP under another protocol", ENOSYS,
         [&] { return setsockopt(file_, IPPROTO_TCP, TCP_ULP, "tls", sizeof "tls"); }},
    };
    expect_outcomes(sandbox_, actions);
    // This is Landlock's.
    expect_outcomes(sandbox_, {{"remove another's file", EACCES, [&] { return unlink((other_ / "file").c_str()); }}});
    // A limit that is known: not only its own file, but those beside it.
    expect_outcomes(sandbox_, {{"remove a neighbour", works, [&] { return unlink((home_ / "neighbour").c_str()); }}});
    const auto below = home_ / "below";
    std::filesystem::create_directory(below);
    put_file(below + "/file", "");
    expect_outcomes(sandbox_,
                    {{"remove a file further down", works, [&] { return unlink((below + "/file").c_str()); }}});
    // Another one: the C library's fstat may be this call, whose path the filter cannot see.
    expect_outcomes(sandbox_, {{"look at a file in other words", works, [] {
                                    struct stat status = {};
                                    return fstatat(AT_FDCWD, "/etc/passwd", &status, AT_EMPTY_PATH);
                                }}});
    // Who has nothing to remove cannot.
    expect_outcomes({"on", "", {}, {}},
                    {{"remove a file", ENOSYS, [&] { return unlink((home_ / "socket").c_str()); }}});
}

TEST_F(SandboxTest, Off) {
    expect_outcomes({"off", "", {}, {}}, {{"open a file", works, [&] { return open("/etc/passwd", O_RDONLY); }},
                                          {"execve", ENOENT, [] { return execl("/no such", "no such", nullptr); }}});
    EXPECT_THAT(state_of({"off", "", {}, {}}), HasSubstr("off"));
}

TEST_F(SandboxTest, AnotherUser) {
    if (getuid() != 0) GTEST_SKIP() << "only root can become another user";
    tool::Sandbox sandbox = {"on", "nobody", {}, {}};
    EXPECT_EQ(state_of(sandbox), "Landlock, seccomp, user nobody");
    EXPECT_EQ(state_of({"off", "nobody", {}, {}}), "off, user nobody (--sandbox=off)");
    EXPECT_THAT(state_of({"on", "no such user", {}, {}}), AllOf(HasSubstr("error"), HasSubstr("no such user")));
    // For good, and with all that it could do as root.
    const auto ended = in_a_process([](int) {
        const gid_t group = 6;
        if (setgroups(1, &group) != 0) return 5;
        if (!tool::enter_sandbox({"off", "nobody", {}, {}})) return 1;
        if (getuid() == 0 || geteuid() == 0 || getgid() == 0 || getgroups(0, nullptr) != 0) return 2;
        if (setuid(0) == 0 || seteuid(0) == 0) return 3;
        return open("/etc/shadow", O_RDONLY) < 0 ? 0 : 4;
    });
    EXPECT_EQ(ended.status, 0);
    // From there nobody becomes anybody.
    EXPECT_THAT(state_of(sandbox, [] { static_cast<void>(setuid(65534)); }),
                AllOf(HasSubstr("error"), HasSubstr("root")));
    // Only a socket is given away, not what somebody has put in its place.
    put_file(other_ / "shadow", "");
    std::filesystem::create_symlink(other_ / "shadow", other_ / "link");
    for (const std::string name : {"shadow", "link", "missing"}) {
        sandbox.given = {other_ / name};
        EXPECT_THAT(state_of(sandbox), AllOf(HasSubstr("error"), HasSubstr(name))) << name;
    }
    struct stat status = {};
    ASSERT_EQ(stat((other_ / "shadow").c_str(), &status), 0);
    EXPECT_EQ(status.st_uid, 0U);
}

#ifdef QCOW_SECCOMP
/// As in a container that does not let its processes confine themselves.
void forbid(bool landlock, bool seccomp) {
    const auto filter = seccomp_init(SCMP_ACT_ALLOW);
    if (landlock) seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(landlock_create_ruleset), 0);
    if (seccomp) {
        seccomp_rule_add(filter, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(seccomp), 0);
        const scmp_arg_cmp sets_seccomp = {.arg = 0, .op = SCMP_CMP_EQ, .datum_a = PR_SET_SECCOMP, .datum_b = 0};
        seccomp_rule_add_array(filter, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(prctl), 1, &sets_seccomp);
    }
    seccomp_load(filter);
    seccomp_release(filter);
}

TEST_F(SandboxTest, WhereTheSystemLacksSomething) {
    const tool::Sandbox automatic;
    EXPECT_THAT(state_of(automatic, [] { forbid(true, false); }), testing::StartsWith("seccomp (no Landlock: "));
    EXPECT_THAT(state_of(automatic, [] { forbid(false, true); }), testing::StartsWith("Landlock (no seccomp: "));
    EXPECT_THAT(state_of(automatic, [] { forbid(true, true); }), testing::StartsWith("off (no Landlock: "));
    EXPECT_THAT(state_of(sandbox_, [] { forbid(true, false); }),
                AllOf(HasSubstr("error"), HasSubstr("no Landlock"), Not(HasSubstr("no seccomp"))));
    EXPECT_THAT(state_of(sandbox_, [] { forbid(false, true); }),
                AllOf(HasSubstr("error"), HasSubstr("no seccomp"), Not(HasSubstr("no Landlock"))));
}
#endif

}  // namespace
}  // namespace qcow::test
