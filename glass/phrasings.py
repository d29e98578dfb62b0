"""How one asks about a function: lists for the dataset docs, which wording.py draws from.

{} is a name, or what a thing does. The last N_TEST of each kind are for the test alone, the one
before them is for validation. Those of the test were written by somebody who had not seen the others.
"""

N_TEST = 3


def lines_of(text):
    """The lines of a text, without the space around them, as a list."""
    return [line.strip() for line in text.strip().splitlines()]


QUESTIONS = {
    "does": lines_of("""
        What does {} do?
        What is {} for?
        Explain {}.
        What is the purpose of {}?
        Describe {} in one sentence.
        Tell me what {} does.
        {}: what is it?
        What happens when I use {}?
        What is {}?
        What will {} do?
        Say what {} is for.
        Please explain {} to me.
        I do not understand {}. What does it do?
        What can I do with {}?
        Could you describe {}?
        What is the meaning of {}?
        When is {} useful?
        What does the documentation say about {}?
        Give a short description of {}.
        I would like to know what {} does.
        Say in a few words what {} is.
        {}, what does it do?
        Define {}.
        What job does {} have?
        I found {} in some code. What is it good for?
        Can you tell me about {}?
        Why would I use {}?
        In short, what can {} do for me?
        How would you explain {}?
        Summarise {}.
        What is {} good for?
        What is the use of {}?
        I saw {}. What is that?
        What does calling {} do?
        What is the idea of {}?
        Can {} help me? What does it do?
        Remind me what {} does.
        Tell me about {}.
        Describe {}.
        Which task does {} solve?
        Give me the gist of {}.
        What does one use {} for?
        {} - what does that do?
        Is {} something that I would need? What for?
        {} - what is it about?
        {} ... remind me what that is.
        Take {}. What is it there for?
        About {}: what is it?
        How does {} work?
        How do I use {}?
        And {}?
        And what about {}?
        Help me understand {}.
        Do you know what {} is about?
        What effect does {} have?
        What does {} return?
        What do I get from {}?
        What results from {}?
        So what exactly is {}?
        Never heard of {}, what is it?
        I wonder what {} might do.
        If I run {}, what happens?
        My code uses {}. Why?
        For what would one want {}?
        Is there a one-line description of {}?
        Quick summary of {}?
        Documentation of {}, please.
        Info on {}.
        What's {}?
        What's {} for?
        What's the point of {}?
        A word on {}, please.
        Tell me a bit more on {}.
        Could you say what {} does?
        Could you explain in a sentence what {} is for?
        I keep seeing {} in other people's code; tell me its purpose.
        Give me a short description of what happens when I call {}.
        Do you know what {} does?
        I keep running into {} in other people's code; what is it actually for?
        Could you explain in a sentence what purpose {} serves?
        Not sure I get the point of {}, so what happens when I call it?
        Could you tell me what {} does in Python?
        i keep seeing {} in other people's code, what does it actually do
        Explain {} in one sentence please.
        hi, im new to python and i keep seeing {} in code, what is it for?
        {} - what's it do
        Could you explain to the class, in one sentence, the purpose of {}?
        quick q, whats {} do exactly
        Hello, could you please explain me what is the purpose of {}? Thank you.
        I came across {} in some lecture code today, and I would like to understand what it actually does.
        whats {} do
        Please, can you explain me what is doing {} ?
        I would like to understand what {} does when it is used in a program.
        """),
    "arguments": lines_of("""
        Which arguments does {} take?
        What are the arguments of {}?
        What is the signature of {}?
        Show the parameters of {}.
        How do I call {}?
        Name the arguments of {}.
        {}: which parameters?
        What can be passed to {}?
        How is {} called?
        List the arguments of {}.
        Which arguments can {} have?
        What does {} take as arguments?
        Please show the signature of {}.
        {}, which arguments?
        Write down the parameters of {}.
        Which values do I give to {}?
        With which arguments is {} called?
        What does {} accept?
        Tell me the arguments of {}.
        How must I call {}?
        What goes into the brackets of {}?
        I want to call {}. With what?
        What should be passed to {}?
        What parameters are there in {}?
        What does a call of {} look like?
        Which parameters does {} have?
        What do I pass to {}?
        Give me the signature of {}, please.
        What can I give to {}?
        How many arguments does {} have, and which?
        Show me how {} is called.
        Which inputs does {} want?
        What do the arguments of {} look like?
        I forgot the arguments of {}.
        What must I hand to {}?
        Does {} take arguments? Which?
        Please list what {} takes.
        What do I need to call {}?
        Which options does {} have?
        Could you show what {} takes?
        What arguments should I give {}?
        Can you list the parameters of {}?
        What does the signature of {} look like?
        And the arguments of {}?
        {} - how is that called?
        {} takes what?
        Calling {} requires what?
        Signature of {}?
        Arguments for {}, please.
        Args of {}?
        What's the signature of {}?
        What are the parameters that {} expects?
        What does {} expect to be given?
        Which keyword arguments are there for {}?
        How would one call {}?
        What stands between the brackets of {}?
        About {}: which arguments are there?
        Is there anything that I must pass to {}?
        Can I see the signature of {}?
        Let me see the parameters of {}.
        If I call {}, what do I give it?
        Do you know the arguments of {}?
        What inputs are needed for {}?
        Which of its arguments can I set in {}?
        What does {} need?
        {} wants which parameters?
        How was {} defined?
        What parameters can {} be called with?
        What's passed to {}?
        I never remember what {} takes.
        What order do the arguments of {} have?
        Tell me how to call {}.
        Do I have to give {} anything?
        Show me the signature of {}, please.
        What parameters can be passed to {}?
        I'm about to call {} and need to know what goes between the parentheses.
        In which way is {} called?
        When I call {}, what am I supposed to pass in?
        Would you mind listing the parameters that {} accepts?
        My call keeps raising a TypeError, so remind me how the signature of {} goes.
        what args does {} take
        Which parameters can I pass to {}?
        I want to call {} but forgot the signature, can you remind me?
        what do i have to put in the brackets when i use {}?
        Which parameters does {} accept? Please list them in the order in which they are written.
        Hello, I want to call {} but I don't know which arguments it is taking.
        {} params?? cant remember the order
        Please, may I know which arguments I have to give to {} when I call it?
        When I call {} in my program, what arguments does it accept?
        args for {}?
        Hello, which parameters I must to give to {} ?
        Could you list the arguments that {} accepts, please?
        """),
    "module": lines_of("""
        In which module is {}?
        Which module has {}?
        Where is {} defined?
        What do I import to use {}?
        From which module does {} come?
        Name the module of {}.
        {}: which module?
        Which module must I import for {}?
        Which module contains {}?
        Where does {} live?
        Where does {} come from?
        What must be imported for {}?
        {}, in which module?
        Tell me the module of {}.
        In what module can I find {}?
        Which import gives me {}?
        What is the home of {}?
        Where in the standard library is {}?
        Which part of the standard library has {}?
        Please name the module that has {}.
        I need {}. Which module has it?
        What module is {} in?
        Who provides {}?
        From where can I import {}?
        Where do I find {}?
        To which module does {} belong?
        What is the module of {} called?
        I want to use {}. What should I import?
        Which module do I need for {}?
        Where is {} kept?
        Where in Python is {}?
        What should I import to get {}?
        What has {} in it?
        {} belongs to which module?
        Where should I look for {}?
        Which library module offers {}?
        Tell me where {} is.
        Which module defines {}?
        How do I import {}?
        Which module gives me {}?
        Which module is home to {}?
        What module should I import for {}?
        Where can I import {} from?
        And {}, where is that?
        {} - from which module?
        {} is in what module?
        {} comes from where?
        {} is defined where?
        Module of {}?
        About {}: in which module is it?
        What's the module of {}?
        What's the import for {}?
        Is {} in some module?
        Whose is {}?
        How can I get {}?
        Which module do I find {} in?
        Which module has {} in it?
        In what part of the library is {}?
        If I need {}, what do I import?
        To use {}, I import what?
        Do you know where {} is?
        Do you know which module has {}?
        Can you tell me which module {} is from?
        Let me know the module of {}.
        Where did Python put {}?
        Before I can use {}, what must I import?
        What do I have to import before using {}?
        Which package is {} in?
        What package offers {}?
        I am searching for {}. Where is it?
        Which file would I open to find {}?
        Where is the code of {}?
        Where do I have to import {} from?
        Tell me the name of the standard library module that defines {}.
        I want to use {}, but what module does it belong to?
        What does {} belong to?
        I forgot which module {} lives in, can you help me out?
        Please tell me the name of the standard library module that provides {}.
        I want to use {} in my script, so what's the name of the standard library module that contains it?
        which module is {} in?
        Where do I import {} from?
        i need to use {} but don't know what module to import
        how do i know what to import so i can use {}? which module is it in?
        {} lives in which stdlib module
        Suppose a student wants to use {}. In which module of the standard library would they find it?
        where do i import {} from again
        Excuse me, in which module of Python I can find {}?
        My assignment uses {} without showing the import, so could you tell me which module it belongs to?
        which stdlib module has {} in it again?
        I don't find {}, in what module it is?
        Which module of the standard library contains {}?
        """),
    "which": lines_of("""
        Which name does this: {}
        What is it called: {}
        Find the name for this: {}
        I am looking for this: {}
        Name what fits this: {}
        What has this description: {}
        Which function, method or class is meant? {}
        Whose documentation begins like this: {}
        What does this: {}
        I need this: {}
        Which name fits: {}
        Search for this: {}
        Name it: {}
        What is the name? {}
        This is what I want: {}
        Which thing of Python is this? {}
        What do I need for this: {}
        Guess the name: {}
        Tell me the name of this: {}
        What could I call for this? {}
        How is this called: {}
        What was the name of this again: {}
        Look this up: {}
        Which one is it? {}
        What should I use for this: {}
        What in the standard library does this: {}
        Is there anything for this? {}
        Help me find this: {}
        Something for this: {}
        What can do this: {}
        Which name has this description: {}
        Is there a name for this: {}
        Find this: {}
        How do I do this: {}
        Who does this: {}
        Give me the name for this: {}
        I want this: {}
        What would do this: {}
        What is meant by this: {}
        What is this thing called: {}
        What do you call this: {}
        I forgot the name of this: {}
        Which part of the library does this: {}
        How can I do this? {}
        How would one do this: {}
        What function is there for this: {}
        What function does this? {}
        Which class or function does this: {}
        Which method has this job: {}
        Is there a function for this? {}
        Does Python have something for this: {}
        Does the library have this: {}
        I want to do this. What do I call? {}
        I need something that does this: {}
        What name should I look for? {}
        Wanted: {}
        The name of this, please: {}
        Do you know what does this: {}
        Do you know the name of this? {}
        Can you name what does this: {}
        What's the name of this: {}
        What's this called? {}
        Which call would give me this: {}
        With what do I do this: {}
        What in Python is for this: {}
        Something in the library does this. What is it? {}
        If I want this, what do I use? {}
        Tell me what does this: {}
        Which thing is described by this: {}
        Suppose that I need this: {}
        Please find the function for this: {}
        What did Python call this: {}
        I've forgotten the name of the function whose documentation mentions the following: {}
        Can you name the standard library function or class I need for this? {}
        Tell me what the function or class is called that handles the following: {}
        What is there for this: {}
        There must be something built for this already, but what's it called? {}
        I'm trying to remember the name of the function or class that deals with this: {}
        Which standard library function or class should I reach for if this is what I need to handle? {}
        What's the function whose job is this: {}
        I'm looking for something in the standard library that matches this description: {}
        which python function or class does this? {}
        i am looking for something in python with this description but i dont know its name: {}
        need the name of the stdlib function/method/class documented as "... {}"
        How is called the thing in Python which do this: {}
        looking for the stdlib func whose doc says "... {}" name pls
        Dear assistant, I search a function, its description is like this: {} Can you say me the name?
        Our textbook only describes the function with the words "{}" and I want to know which one it is.
        func for this: {}
        I search a function, in the doc is written about it: {}
        What is the name of the function whose description ends with the words "{}"
        """),
    "exists": lines_of("""
        Does {} exist?
        Is there {} in the standard library?
        Is {} a real name?
        Does Python have {}?
        Can I use {} in Python?
        {}: does it exist?
        Is {} part of Python?
        Tell me whether {} exists.
        Is there {}?
        Is {} there?
        Does the standard library have {}?
        Is {} in the library?
        Does Python know {}?
        Could {} be a real name?
        I think there is {}. Is that true?
        Is {} available?
        {}, is that real?
        Has Python got {}?
        Is it true that {} exists?
        Would Python find {}?
        Can {} be imported?
        Say whether there is {}.
        Am I right that {} exists?
        Is {} included in Python?
        Do you know {}?
        Have you heard of {}?
        Is {} something that Python comes with?
        Is there really {}?
        Did someone write {}?
        Have you seen {} before?
        Do I have {} in Python?
        Is there a thing named {}?
        Would {} work?
        Do we have {}?
        Are you sure there is {}?
        Can I call {}?
        Is {} known?
        Is the name {} right?
        Will I find {} in Python?
        Is there such a thing as {}?
        Does anything like {} exist?
        Is {} something I can use?
        Is {} in Python's library?
        Is {} something?
        Is {} something in Python?
        Is {} a thing?
        Is {} a function that I could call?
        Is {} something that exists?
        Is {} made up?
        Was {} ever in Python?
        Did you ever see {}?
        Does {} ring a bell?
        Does {} come with Python?
        Does Python ship {}?
        Does Python offer {}?
        Do you have {}?
        Are there things like {}?
        Python has {}, right?
        There is {}, or not?
        {} exists, does it not?
        {} - is there such a thing?
        {}? Does that exist?
        About {}: is it there?
        May I use {}?
        Could I use {}?
        Can I import {}?
        Can I rely on {} being there?
        Should I find {} in Python?
        Is it possible to use {}?
        Is the standard library home to {}?
        Somebody told me of {}. Is it real?
        I read about {}. Does it exist?
        Someone used {}. Is that part of Python?
        Please check that {} exists.
        Check whether there is {}.
        Do you know whether {} exists?
        Would you know {}?
        Is there really something called {} in Python's standard library?
        Can you confirm that {} is part of the standard library and not something I made up?
        I'm not sure whether the standard library has {}; does it?
        What about {}, is it there?
        Did I dream it up, or is {} really part of the standard library?
        A colleague mentioned {} to me, but does Python actually ship with it?
        I'd like to know whether there is such a thing as {} in the standard library.
        does {} exist in python?
        Is there a {} in the standard library?
        Is {} a real thing or did I make it up?
        is {} a real thing that comes with python or did i make it up?
        does stdlib have {}? y/n
        True or false: the Python standard library contains {}.
        is {} a real thing or did i make that up
        Sorry for my question, but does Python really have {}? I am not sure about it.
        A classmate told me to use {}, but I cannot tell whether it is actually part of Python.
        {} - real or did i make that up
        Is it existing in Python something called {} ?
        Can you confirm whether Python's standard library really includes {}?
        """),
}
# Most people do not ask directly. They ask for what they want to know, or say where they met a name
# and ask about it. For training, such questions are put together from these.
WANTS = lines_of("""
    Tell me ...
    Please tell me ...
    Can you tell me ...?
    Could you tell me ...?
    I want to know ...
    I need to know ...
    I would like to know ...
    I'd like to know ...
    I wonder ...
    I am not sure ...
    I cannot remember ...
    I forgot ...
    Remind me ...
    Let me know ...
    Do you know ...?
    Explain ...
    Say ...
    Would you say ...?
    Find out ...
    Help me find out ...
    What I want to know is ...
""")
WANTED = {
    "does": lines_of("""
        what {} does
        what {} is
        what {} is for
        what {} is used for
        what {} is there for
        what the purpose of {} is
        in one sentence what {} does
        what happens when I call {}
        what happens if {} is called
        what one does with {}
        why people use {}
        what I get from {}
        what calling {} gives me
        the purpose of {}
        the meaning of {}
        what the documentation of {} says
    """),
    "arguments": lines_of("""
        which arguments {} takes
        what arguments {} takes
        what the arguments of {} are
        what to pass to {}
        what I can pass to {}
        which parameters {} has
        the parameters of {}
        the arguments of {}
        the signature of {}
        what the signature of {} is
        how to call {}
        how {} is called
        what goes between the parentheses of {}
        what I have to give to {}
        what {} expects
        what {} accepts
    """),
    "module": lines_of("""
        which module {} is in
        which module has {}
        in which module {} is
        which module of the standard library defines {}
        the module of {}
        the name of the module that has {}
        the name of the standard library module with {}
        which module {} belongs to
        what to import for {}
        what I must import to use {}
        where {} is defined
        where {} comes from
        where to import {} from
        where to find {}
    """),
    "which": lines_of("""
        what does this: {}
        which function does this: {}
        which function or class is for this: {}
        the name of what does this: {}
        the name of the function for the following: {}
        what it is called that does this: {}
        what to use for this: {}
        what has the following description: {}
        which name in the standard library fits this: {}
        how to do this: {}
        the function whose documentation says this: {}
        the class or function that handles this: {}
    """),
    "exists": lines_of("""
        whether {} exists
        if {} exists
        whether there is {}
        whether Python has {}
        if Python has {}
        whether the standard library has {}
        if {} is in the standard library
        whether {} is part of the standard library
        whether {} is real
        whether {} is a real name
        if {} is something in Python
        whether I can use {}
        if there is such a thing as {}
        whether {} is made up
    """),
}
MET = lines_of("""
    I keep seeing {}
    I see {} in a program
    I found {} in my code
    I met {} in a tutorial
    I have {} here
    I am reading code with {}
    I am about to use {}
    I am going to call {}
    I want to use {}
    I would like to use {} in a program
    I have never used {}
    I heard of {}
    I was told to use {}
    I read about {}
    My colleague uses {}
    My program calls {}
    A book mentions {}
    An answer on the web says {}
    The example uses {}
    There is {} in this file
    Take {}
    Let us talk about {}
    This is about {}
""")
JOINED = (". ", "; ", ", and ", ", so ", ", but ", ": ")
ABOUT_IT = {
    "does": lines_of("""
        what does it do?
        what does that do?
        what is it for?
        what is that for?
        what is its purpose?
        tell me its purpose.
        tell me what it does.
        tell me what it is for.
        explain it to me.
        please explain it.
        can you explain it in one sentence?
        describe it in a few words.
        what happens when I call it?
        what would it do for me?
        why would one use it?
        I do not know what it does.
        I need to know what it does.
        what's it good for?
        what does the documentation say?
    """),
    "arguments": lines_of("""
        what are its arguments?
        which arguments does it take?
        what arguments does it take?
        which parameters does it have?
        what do I pass to it?
        what must I give it?
        what goes between the parentheses?
        what is its signature?
        show me its signature.
        tell me its arguments.
        how do I call it?
        how is it called?
        I need to know its arguments.
        I need its signature.
        I do not know what to pass.
        which inputs does it want?
        list its parameters.
    """),
    "module": lines_of("""
        which module is it in?
        what module is it in?
        in which module is it?
        which module has it?
        which module does it belong to?
        what do I import?
        what must I import for it?
        where do I import it from?
        where does it come from?
        where is it defined?
        tell me its module.
        tell me the name of its module.
        what is its module called?
        I need to know what to import.
        I do not know where it is from.
    """),
    "exists": lines_of("""
        does it exist?
        does that exist?
        is it real?
        is that a real name?
        is it in the standard library?
        is that part of Python?
        is it part of the standard library?
        is there such a thing?
        does Python have it?
        can I use it?
        or did I make that up?
        tell me whether it exists.
        I am not sure that it exists.
        can you confirm that it exists?
        is it something that Python has?
    """),
}
# what people in a hurry type before or after a name
KEYWORDS = {
    "does": lines_of("""
        purpose
        meaning
        what
        what for
        use
        what does it do
        explain
        description
        docs
        summary
        for what
    """),
    "arguments": lines_of("""
        args
        arguments
        params
        parameters
        signature
        inputs
        how to call
        call with what
        takes what
        list of arguments
        usage
    """),
    "module": lines_of("""
        module
        package
        import
        import from
        which module
        from where
        where from
        where
        which import
        home
    """),
    "exists": lines_of("""
        exists
        does it exist
        real
        real or not
        true or false
        yes or no
        in the standard library or not
        in Python
        part of Python
        available
        made up
    """),
}
KEYWORD_FORMS = (
    "{}: ...",
    "{} ...",
    "... {}",
    "{}, ...",
    "{} - ...",
    "...: {}",
    "{}? ...",
    "... of {}",
)
# about what the question before named; the last N_TEST are for the test alone
FOLLOW_UPS = lines_of("""
    And its arguments?
    Which arguments does it take?
    How do I call it?
    What are its parameters?
    And the signature?
    Show its arguments.
    With which arguments?
    What can be passed to it?
    How is it called?
    Now the arguments, please.
    What do I pass to it?
    And what does it take?
    Which parameters has it got?
    What arguments does it have?
    How must I call it?
    Which arguments can I give?
    Its signature, please.
    What are the arguments?
    Which parameters does that have?
    And how would I call that?
    Its arguments?
    And which arguments?
    And how do I call it?
    And the parameters?
    What does it need?
    What does it expect?
    What does it want?
    What do I give it?
    Can you show the signature?
    Show me how to call it.
    Tell me its arguments.
    And what are the arguments of that?
    What's its signature?
    Which parameters?
    Which inputs does it need?
    What goes into the brackets?
    How do I call that?
    And what should I pass?
    List its parameters.
    Now list the parameters of that function, please.
    OK, so what do I have to pass to it?
    Do I pass anything?
    Great, and what arguments does it take?
    Thanks, could you show me its signature as well?
    OK, so which parameters do I need to give it?
    and what arguments does it take?
    ok thanks, what parameters can I give it
    Got it. How do I call it, I mean which arguments does it accept?
    ok thanks! and what do i need to give it when i call it?
    Good. Now tell me which parameters it takes.
    Thank you, I understand. And what are the arguments of it, please?
    ok and what do i pass it
    Thank you, this is clear. And which arguments does it need, please?
    Now that I understand what the function does, could you list the parameters that it takes?
    ok and what args does it take
    And which are the parameters of this function?
    Thank you; could you now tell me what arguments I need to pass to it?
""")
# What any question may say as well: a model that meets "in Python" only where it is asked whether a
# name exists answers "Yes" to whatever ends so.
NAMED = lines_of("""
    the function {}
    the {} function
    the method {}
    the class {}
    the name {}
    the thing called {}
    Python's {}
    {} in Python
    {} from the standard library
    this {}
    a {}
    '{}'
    `{}`
    {}()
""")
TAILS = (
    " in Python",
    " in python",
    " in the standard library",
    " in Python's standard library",
    " in general",
    " exactly",
    " actually",
    " again",
    " please",
    ", please",
    " for me",
    " then",
    " in one sentence",
    " in my program",
)
# what people say before and after a question
POLITE = lines_of("""
    Hello. ...
    Hello, ...
    Hi, ...
    Hi! ...
    Hey, ...
    Please: ...
    Please, ...
    A question: ...
    A quick question: ...
    Just a question: ...
    One more thing: ...
    Sorry, ...
    Excuse me, ...
    Sorry to bother you, ...
    I am new to this, ...
    As a beginner I ask: ...
    OK, ...
    OK so ...
    So, ...
    Well, ...
    Tell me, ...
    Good morning. ...
    Dear all, ...
    You know Python: ...
    I am stuck. ...
    For my homework: ...
    ... Thanks.
    ... Thanks!
    ... Thank you.
    ... Thank you very much.
    ... I forgot.
    ... I am not sure.
    ... I do not remember.
    ... I cannot look it up now.
    ... It is for my homework.
    ... Anyone?
    ... Be short.
    ... Just curious.
    ... Help!
""")
# words that may stand for each other in a question
SAME = (
    ("arguments", "args", "parameters", "params", "arguments", "parameters"),
    ("which", "what"),
    ("tell", "show", "give"),
    ("can", "could", "would"),
    ("explain", "describe", "summarise"),
    ("need", "want", "have"),
    ("use", "call", "try"),
    ("find", "see", "get"),
    ("module", "package", "module"),
    ("purpose", "point", "job"),
    ("standard library", "stdlib", "library"),
    ("function", "method", "class", "function or class", "name"),
    ("real", "actual", "true"),
    ("what is", "what's"),
    ("i am", "i'm"),
    ("do not", "don't"),
    ("i would", "i'd"),
)
