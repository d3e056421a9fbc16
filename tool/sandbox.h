#pragma once
// Giving up what a process no longer needs: whoever takes it over, by a mistake in it, has gained little.

#include <string>
#include <vector>

#include "qcow/error.h"

namespace tool {

struct Sandbox {
    std::string mode = "auto";         // "auto": what this system has; "on": nothing less than all of it; "off"
    std::string user;                  // an account to become; empty: none
    std::vector<std::string> given;    // sockets that are made over to that user
    std::vector<std::string> removed;  // files that the process removes when it ends
};

/// From now on the process can use the files and sockets that it has, accept clients, start threads, and remove
/// `removed`, or other files beneath the directories of these; it opens, makes, runs and connects to nothing. To be
/// called while there is only one thread. Returns, for people, what confines the process now: "Landlock, seccomp".
/// Errc::unsupported: it is "on", and this system lacks something; not_found: no such user; access_denied.
qcow::Result<std::string> enter_sandbox(const Sandbox& sandbox);

}  // namespace tool
