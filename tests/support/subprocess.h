#pragma once
// Other programs: run to their end, or kept running beside the test.

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace qcow::test {

/// A program that has ended.
struct Finished {
    int status = -1;  ///< exit status; 128 + N if signal N ended it
    std::string out;
    std::string err;
    std::string command;

    /// All of it, for messages.
    [[nodiscard]] std::string text() const;
};

/// A running program with pipes to its standard input, output and error. Killed, if need be, when it goes.
class Subprocess {
public:
    using Clock = std::chrono::steady_clock;

    explicit Subprocess(const std::vector<std::string>& argv, const std::filesystem::path& directory = {});
    Subprocess(const Subprocess&) = delete;
    Subprocess& operator=(const Subprocess&) = delete;
    ~Subprocess();

    void write(const std::string& text);

    void signal(int number) const { kill(pid_, number); }

    void close_input();

    /// Waits until its output (standard output and error together) contains `text`.
    void wait_for(const std::string& text, std::chrono::seconds timeout = std::chrono::seconds(30));

    /// Waits for its end; a program that takes longer than the timeout is killed, and that is an error.
    Finished finish(std::chrono::seconds timeout = std::chrono::seconds(120));

private:
    /// Takes what there is to read, waiting for it; false if there is nothing and never or not in time will be.
    bool collect(Clock::time_point deadline);

    static void take(int& fd, std::string& to);

    [[nodiscard]] std::string seen() const { return "\"" + finished_.out + finished_.err + "\""; }

    [[noreturn]] void fail(const std::string& what, int error) const;

    void close_pipes();

    std::string command_;
    pid_t pid_ = -1;
    int in_ = -1;
    int out_ = -1;
    int err_ = -1;
    Finished finished_;
};

/// Runs a program to its end, with an empty standard input.
Finished run(const std::vector<std::string>& argv, const std::filesystem::path& directory = {});

/// As run(), where anything but success means that the test itself is broken.
Finished must_run(const std::vector<std::string>& argv, const std::filesystem::path& directory = {});

}  // namespace qcow::test
