#pragma once
// The sandbox of a process that reads what strangers made: a server, and the reader of a file system. It limits what an
// attacker who takes over the process can do.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "qcow/error.h"

namespace tool {

/// What a process may use up.
struct ProcessLimits {
    std::uint64_t memory_bytes = 0;
    std::uint64_t processor_seconds = 0;  // another process may raise it (prlimit)
    bool writes_files = false;
};

struct Sandbox {
    std::string mode = "auto";         // "auto": what this system has; "on": all of it, or fail; "off": nothing
    std::string user;                  // the account to switch to; empty: none
    std::vector<std::string> given;    // sockets that this account then owns
    std::vector<std::string> removed;  // files that the process removes when it ends
    bool shares_memory = false;        // the process exchanges memory and events with others
    std::optional<ProcessLimits> limits = {};
};

/// Confines the process. It can then use the files and sockets that it has open, accept clients, start threads, and
/// remove files in the directories of `removed` and below. It cannot open or make files, connect, or run programs.
/// Returns what is in force, as text for people: "Landlock, seccomp".
///
/// Errors: Errc::unsupported if `mode` is "on" and this system lacks something; Errc::not_found for an unknown user;
/// Errc::access_denied.
/// Thread safety: the process must have only one thread.
qcow::Result<std::string> enter_sandbox(const Sandbox& sandbox);

}  // namespace tool
