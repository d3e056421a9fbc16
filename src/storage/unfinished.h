#pragma once
// What is not finished, as a handler of signals that end the process can find it.

#include <string>

#include "qcow/storage.h"

namespace qcow {

struct UnfinishedSlot;

/// Lists a path for abandon_new_files, from its construction to its destruction. Any number, on any threads.
class Unfinished {
public:
    /// A temporary name, to be removed.
    explicit Unfinished(const std::string& path);
    /// A file that is to be told of as incomplete.
    Unfinished(const std::string& path, Incomplete what);
    Unfinished(const Unfinished&) = delete;
    Unfinished& operator=(const Unfinished&) = delete;
    ~Unfinished();

private:
    Unfinished(const std::string& path, int state);

    UnfinishedSlot* slot_;
};

}  // namespace qcow
